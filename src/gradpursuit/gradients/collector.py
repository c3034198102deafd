"""From tables of rows to gradient stores: one backward pass a batch feeds every preconditioner that is wanted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from gradpursuit.data import Row, Table
from gradpursuit.errors import GradientError
from gradpursuit.gradients.engine import Computed, FeatureEngine
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.gradients.sketch import SparseSketch
from gradpursuit.progress import Progress
from gradpursuit.store import GradientStore, Shard, StoreSpec
from gradpursuit.trajectory.checkpoint import Checkpoint
from gradpursuit.trajectory.model import Compute, trainable

Todo = Mapping[tuple[int, int], list[Preconditioner]]  # (checkpoint, shard) -> the kinds whose stores lack it


class Fill(Protocol):
    """What computes and writes shards."""

    def __call__(
        self,
        table: Table,
        stores: Mapping[Preconditioner, GradientStore],
        todo: Todo,
        advance: Callable[[int], None],
    ) -> Iterator[Mapping[int, str]]:
        """Write the shards `todo`, telling `advance` of rows as they are done; of each shard the dropped rows."""


@dataclass(frozen=True)
class CollectSpec:
    """What the features of a run have in common.

    Attributes:
        dim, nonzeros, sketch_seed: of the sketch.
        tokens_per_batch: padded tokens in one backward pass.
        dtype: of the stored features.
        shard_rows: rows per shard.
        max_dropped: share of a table's rows that may be without a feature before it is an error.
        origin: hashes of model, adapter and trajectory, as JSON values, for the identity of the stores.
    """

    dim: int
    nonzeros: int
    sketch_seed: int
    tokens_per_batch: int
    dtype: str
    shard_rows: int
    max_dropped: float
    origin: Mapping[str, Any]


class Collector:
    """Collects features of tables along a trajectory into stores; finished shards are never computed again.

    Args:
        model: whose trainable parameters are those of the checkpoints.
        compute: device and precision.
        checkpoints: the trajectory.
        spec: sizes, seeds and origin.

    Attributes:
        fill: who computes and writes shards; this process, unless it is set to something else.
        precision: of forward and backward, float32 or bfloat16.
    """

    def __init__(
        self, model: nn.Module, compute: Compute, checkpoints: Sequence[Checkpoint], spec: CollectSpec
    ) -> None:
        self.fill: Fill = self._fill_here
        self._model, self._checkpoints, self._spec = model, checkpoints, spec
        sizes = {name: parameter.numel() for name, parameter in trainable(model).items()}
        self._sketch = SparseSketch(sizes, spec.dim, spec.nonzeros, spec.sketch_seed, compute.device)
        self._engine = FeatureEngine(model, compute, self._sketch, spec.tokens_per_batch)
        self._at: tuple[int, tuple[Preconditioner, ...]] | None = None
        self.precision = str(compute.autocast or torch.float32).removeprefix("torch.")

    def collect(
        self, name: str, table: Table, wanted: Sequence[Preconditioner], folder: Path
    ) -> dict[str, GradientStore]:
        """Features of every row of `table` at every checkpoint, one store for each of `wanted`.

        A row that has no feature at some checkpoint is dropped from all stores, with its reason.

        Args:
            name: of the split, for progress.
            table: the rows.
            wanted: preconditioners.
            folder: gets one store per preconditioner, named by its label.

        Raises:
            GradientError: more than `max_dropped` of the rows have no feature; ids and reasons are named.
            RunError: the disk is full.
        """
        stores = {kind: self._create(folder / kind.label, table, kind) for kind in wanted}
        shards = next(iter(stores.values())).spec.shards()
        todo = {
            (t, s): lacking
            for t in range(len(self._checkpoints))
            for s in range(len(shards))
            if (lacking := [kind for kind, store in stores.items() if not store.has(t, s)])
        }
        finished = [
            store.read(t, s).dropped
            for t in range(len(self._checkpoints))
            for s in range(len(shards))
            for kind, store in stores.items()
            if kind not in todo.get((t, s), ())
        ]
        dropped = {row: why for part in finished for row, why in part.items()}
        self._refuse_too_many(table, stores, dropped)
        if todo:
            self._compute(name, table, stores, todo, dropped)
        self._settle(table, stores)
        return {kind.label: store for kind, store in stores.items()}

    def _compute(
        self,
        name: str,
        table: Table,
        stores: Mapping[Preconditioner, GradientStore],
        todo: Todo,
        dropped: dict[int, str],
    ) -> None:
        """Fill the shards `todo`; add to `dropped`."""
        shards = next(iter(stores.values())).spec.shards()
        total = len(table) * len(self._checkpoints)
        done = total - sum(len(shards[s]) for _, s in todo)
        with Progress(f"gradients of the {name}", total, "rows", done) as progress:
            for found in self.fill(table, stores, todo, progress.update):
                if found:
                    dropped.update(found)
                    self._refuse_too_many(table, stores, dropped)

    def _fill_here(
        self,
        table: Table,
        stores: Mapping[Preconditioner, GradientStore],
        todo: Todo,
        advance: Callable[[int], None],
    ) -> Iterator[Mapping[int, str]]:
        shards = next(iter(stores.values())).spec.shards()
        for (t, s), lacking in todo.items():
            rows = [table[i] for i in shards[s]]
            made = self.shards(t, lacking, rows, shards[s], advance)
            for kind, shard in zip(lacking, made, strict=True):
                stores[kind].write(t, s, shard)
            yield made[0].dropped

    def shards(
        self,
        checkpoint: int,
        wanted: Sequence[Preconditioner],
        rows: Sequence[Row],
        numbers: range,
        advance: Callable[[int], None],
    ) -> list[Shard]:
        """The shards of `rows` at a checkpoint (from 0), one for each of `wanted`.

        numbers: of the rows in the table. advance: told how many more rows are done.
        """
        return _as_shards(self.at(checkpoint, wanted).compute(rows, advance), numbers)

    def at(self, checkpoint: int, wanted: Sequence[Preconditioner]) -> FeatureEngine:
        """The engine at a checkpoint (from 0), set to compute features of `wanted`."""
        if self._at != (checkpoint, tuple(wanted)):
            self._checkpoints[checkpoint].load_adapter(self._model)
            self._engine.prepare(wanted, self._checkpoints[checkpoint].adam(self._model))
            self._at = (checkpoint, tuple(wanted))
        return self._engine

    def _settle(self, table: Table, stores: Mapping[Preconditioner, GradientStore]) -> None:
        """All checkpoints of all stores must hold the same rows."""
        dropped = {row: reason for store in stores.values() for row, reason in store.dropped().items()}
        self._refuse_too_many(table, stores, dropped)
        for store in stores.values():
            store.exclude(dropped)

    def _refuse_too_many(
        self, table: Table, stores: Mapping[Preconditioner, GradientStore], dropped: Mapping[int, str]
    ) -> None:
        """The rows dropped so far, index to reason, must be few enough."""
        if len(dropped) <= self._spec.max_dropped * len(table):
            return
        named = [(table[i], dropped[i]) for i in sorted(dropped)]
        some = ", ".join(f"'{row.id}' ({reason})" for row, reason in named[:5])
        advice = (
            "every row so far is affected, so look at the model's weights and at warmup.learning_rate"
            if len(dropped) == _rows_seen(next(iter(stores.values())))
            else "remove these rows, or raise gradients.max_dropped"
            + (", or try model.precision: float32" if self.precision != "float32" else "")
        )
        raise GradientError(
            f"{len(dropped)} of {len(table)} rows have no gradient, more than gradients.max_dropped = "
            f"{self._spec.max_dropped:g} allows: {some}; first at {named[0][0].source}:{named[0][0].line}; {advice}"
        )

    def _create(self, folder: Path, table: Table, kind: Preconditioner) -> GradientStore:
        spec = self._spec
        origin = {
            **spec.origin,
            **identity(table, kind),
            "projection": self._sketch.describe(),
            "precision": {"autocast": self.precision, "tokens_per_batch": spec.tokens_per_batch},
        }
        return GradientStore.create(
            folder,
            StoreSpec(tuple(table.ids), len(self._checkpoints), spec.dim, spec.dtype, spec.shard_rows, origin),
        )


def _rows_seen(store: GradientStore) -> int:
    """Rows of the shards that are there at any checkpoint."""
    checkpoints = range(store.spec.checkpoints)
    return sum(
        len(rows) for s, rows in enumerate(store.spec.shards()) if any(store.path(t, s).exists() for t in checkpoints)
    )


def identity(table: Table, kind: Preconditioner) -> dict[str, Any]:
    """What a store holds features of: sha256 of the rows' content and of what is supervised, and the preconditioner."""
    data, masks = hashlib.sha256(), hashlib.sha256()
    for row in table:
        data.update(f"{row.hash}:{row.input_ids}\n".encode())
        masks.update(f"{row.labels}\n".encode())
    preconditioner = {"name": kind.name, "bias_correction": kind.bias_correction}
    return {"data": data.hexdigest(), "masks": masks.hexdigest(), "preconditioner": preconditioner}


def _as_shards(found: Computed, rows: range) -> list[Shard]:
    """One shard for each preconditioner of the rows of the table at `rows`."""
    index = np.array([rows[i] for i in found.kept], dtype=np.int64)
    dropped = {rows[i]: reason for i, reason in found.dropped.items()}
    loss, tokens = found.loss.numpy(), found.tokens.numpy()
    return [Shard(kind.features.numpy(), kind.norm.numpy(), loss, tokens, index, dropped) for kind in found.kinds]
