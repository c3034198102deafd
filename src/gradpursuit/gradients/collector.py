"""From tables of rows to gradient stores: one pass a batch feeds every kind of feature that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gradpursuit.data import Table
from gradpursuit.gradients.engine import FeatureEngine
from gradpursuit.gradients.filling import CollectSpec, StoreFiller, identity
from gradpursuit.gradients.forward import ForwardEngine, Signal
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.gradients.sketch import SparseSketch
from gradpursuit.store import StoreSpec
from gradpursuit.trajectory.checkpoint import Checkpoint
from gradpursuit.trajectory.model import Compute, trainable


class Collector(StoreFiller[Preconditioner]):
    """Collects sketched gradients along a trajectory: one backward pass a batch feeds every preconditioner.

    Args:
        model: whose trainable parameters are those of the checkpoints.
        compute: device and precision.
        checkpoints: the trajectory.
        spec: sizes, seeds and origin.
    """

    def __init__(
        self, model: nn.Module, compute: Compute, checkpoints: Sequence[Checkpoint], spec: CollectSpec
    ) -> None:
        super().__init__(compute, spec)
        self._model, self._checkpoints = model, checkpoints
        sizes = {name: parameter.numel() for name, parameter in trainable(model).items()}
        self._sketch = SparseSketch(sizes, spec.dim, spec.nonzeros, spec.sketch_seed, compute.device)
        self._engine = FeatureEngine(model, compute, self._sketch, spec.tokens_per_batch)
        self._at: tuple[int, tuple[Preconditioner, ...]] | None = None

    def at(self, checkpoint: int, wanted: Sequence[Preconditioner]) -> FeatureEngine:
        """The engine at a checkpoint (from 0), set to compute features of `wanted`."""
        if self._at != (checkpoint, tuple(wanted)):
            self._checkpoints[checkpoint].load_adapter(self._model)
            self._engine.prepare(wanted, self._checkpoints[checkpoint].adam(self._model))
            self._at = (checkpoint, tuple(wanted))
        return self._engine

    def store_spec(self, table: Table, kind: Preconditioner) -> StoreSpec:
        """Sketches of all checkpoints."""
        spec = self.spec
        origin = {
            **spec.origin,
            **identity(table, kind),
            "projection": self._sketch.describe(),
            "precision": {"autocast": self.precision, "tokens_per_batch": spec.tokens_per_batch},
        }
        return StoreSpec(tuple(table.ids), len(self._checkpoints), spec.dim, spec.dtype, spec.shard_rows, origin)

    def progress_name(self, split: str, wanted: Sequence[Preconditioner]) -> str:
        """`gradients of the pool`."""
        return f"gradients of the {split}"


class SignalCollector(StoreFiller[Signal]):
    """Collects what a forward pass tells, one signal at a time: of the base model and, for some, along the trajectory.

    Args:
        model: as it was before any training, with the trainable parameters of the checkpoints.
        compute, checkpoints, spec: as for :class:`Collector`; what is stored is float32.
    """

    def __init__(
        self, model: nn.Module, compute: Compute, checkpoints: Sequence[Checkpoint], spec: CollectSpec
    ) -> None:
        super().__init__(compute, spec)
        self._model, self._checkpoints = model, checkpoints
        self._base = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
        self._at: int | None = 0

    def at(self, checkpoint: int, wanted: Sequence[Signal]) -> ForwardEngine:
        """The engine of the one signal in `wanted` at the base model (0) or a checkpoint (from 1)."""
        (signal,) = wanted
        if self._at != checkpoint:
            if checkpoint == 0:
                for name, parameter in trainable(self._model).items():
                    parameter.data.copy_(self._base[name])
            else:
                self._checkpoints[checkpoint - 1].load_adapter(self._model)
            self._at = checkpoint
        return ForwardEngine(self._model, self._where, signal, self.spec.tokens_per_batch)

    def store_spec(self, table: Table, kind: Signal) -> StoreSpec:
        """One checkpoint for the base model, and one for each of the trajectory if the signal goes along."""
        spec = self.spec
        origin: dict[str, Any] = {
            **signal_origin(spec.origin, kind),
            **identity(table, kind),
            "precision": {"autocast": self.precision, "tokens_per_batch": spec.tokens_per_batch},
        }
        points = 1 + len(self._checkpoints) if kind.along else 1
        width = ForwardEngine(self._model, self._where, kind, spec.tokens_per_batch).widths[0]
        return StoreSpec(tuple(table.ids), points, width, "float32", spec.shard_rows, origin)

    def progress_name(self, split: str, wanted: Sequence[Signal]) -> str:
        """`embedding of the pool`."""
        (signal,) = wanted
        return f"{signal.label} of the {split}"


def signal_origin(origin: Any, kind: Signal) -> dict[str, Any]:
    """What of a run's origin a signal depends on: of the base model alone, nothing that came of training."""
    return dict(origin) if kind.along else {"model": origin["model"]}
