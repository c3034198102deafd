"""From rows to features in a store: one backward pass a batch feeds every preconditioner that is wanted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradpursuit.data import Row, Table
from gradpursuit.errors import GradientError
from gradpursuit.gradients.hooks import PerExampleGradients
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.gradients.sketch import SparseSketch
from gradpursuit.progress import Progress
from gradpursuit.store import GradientStore, Shard, StoreSpec
from gradpursuit.trajectory.checkpoint import AdamState, Checkpoint
from gradpursuit.trajectory.loss import SupervisedLoss, collate, token_batches
from gradpursuit.trajectory.model import Compute, trainable

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Features:
    """Of n rows: sketched `features [n, d]`, their `norm [n]` before the sketch, all float32."""

    features: Tensor
    norm: Tensor


class FeatureEngine:
    """Per-example features of a model at its present checkpoint.

    Args:
        model: with a trainable LoRA adapter.
        compute: device and precision.
        sketch: of the adapter's parameters, on that device.
        tokens_per_batch: padded tokens in one backward pass.
    """

    def __init__(self, model: PeftModel, compute: Compute, sketch: SparseSketch, tokens_per_batch: int) -> None:
        self._model = model.eval()  # dropout would make a feature another one each time
        self._gradients = PerExampleGradients(model)
        self._loss = SupervisedLoss(model, compute)
        self._sketch, self._budget, self._device = sketch, tokens_per_batch, compute.device
        self._pad = int(model.config.pad_token_id or 0)

    def batch(
        self, rows: Sequence[Row], wanted: Sequence[Preconditioner], state: AdamState
    ) -> tuple[list[Features], Tensor, Tensor]:
        """Features of one batch for each of `wanted`, its losses [B] float32 and supervised tokens [B] int64.

        The feature of a row is P Γ(∇ℓ), ℓ the mean negative log-likelihood over its supervised tokens; no learning
        rate is in it.
        """
        sketches = [torch.zeros(self._sketch.dim, len(rows), device=self._device) for _ in wanted]
        squares = [torch.zeros(len(rows), device=self._device) for _ in wanted]

        unused = dict(self._sketch.sizes)

        def consume(parameter: str, gradient: Tensor) -> None:
            unused.pop(parameter, None)
            for kind, out, square in zip(wanted, sketches, squares, strict=True):
                values = kind(parameter, gradient, state).flatten(1)
                square += torch.linalg.vecdot(values, values)
                self._sketch.add(parameter, values, out)

        with self._gradients.capture(consume):
            losses, tokens = self._loss(collate(rows, self._pad))
            losses.sum().backward()
        shapes = {name: parameter.shape for name, parameter in trainable(self._model).items()}
        for name in list(unused):  # its gradient is zero, but Adam's momentum would move it all the same
            consume(name, torch.zeros(len(rows), *shapes[name], device=self._device))
        self._model.zero_grad(set_to_none=True)
        features = [Features(s.t(), q.sqrt()) for s, q in zip(sketches, squares, strict=True)]
        return features, losses.detach(), tokens

    def shard(
        self,
        rows: Sequence[Row],
        start: int,
        wanted: Sequence[Preconditioner],
        state: AdamState,
        progress: Progress,
    ) -> list[Shard]:
        """Shards of consecutive rows that begin at index `start`, one for each of `wanted`.

        Raises:
            GradientError: a loss is not finite, or a gradient is zero; the row's id is named.
        """
        n = len(rows)
        features = [torch.empty(n, self._sketch.dim) for _ in wanted]
        norms = [torch.empty(n) for _ in wanted]
        loss, tokens = torch.empty(n), torch.empty(n, dtype=torch.int32)
        for indices in token_batches([len(row.input_ids) for row in rows], self._budget):
            found, batch_loss, batch_tokens = self.batch([rows[i] for i in indices], wanted, state)
            for target, norm, part in zip(features, norms, found, strict=True):
                target[indices], norm[indices] = part.features.cpu(), part.norm.cpu()
            loss[indices], tokens[indices] = batch_loss.cpu(), batch_tokens.to("cpu", torch.int32)
            progress.update(len(indices))
        for norm in norms:
            _refuse_bad_rows(rows, norm, loss)
        index = np.arange(start, start + n, dtype=np.int64)
        return [
            Shard(f.numpy(), norm.numpy(), loss.numpy(), tokens.numpy(), index)
            for f, norm in zip(features, norms, strict=True)
        ]


@dataclass(frozen=True)
class CollectSpec:
    """What the features of a run have in common.

    Attributes:
        dim, nonzeros, sketch_seed: of the sketch.
        tokens_per_batch: padded tokens in one backward pass.
        dtype: of the stored features.
        shard_rows: rows per shard.
        origin: hashes of model and trajectory, as JSON values, for the fingerprint of the stores.
    """

    dim: int
    nonzeros: int
    sketch_seed: int
    tokens_per_batch: int
    dtype: str
    shard_rows: int
    origin: Mapping[str, Any]


class Collector:
    """Collects features of tables along a trajectory into stores; finished shards are never computed again.

    Args:
        model: with a trainable LoRA adapter, whose weights the checkpoints replace.
        compute: device and precision.
        checkpoints: the trajectory.
        spec: sizes, seeds and origin.
    """

    def __init__(
        self, model: PeftModel, compute: Compute, checkpoints: Sequence[Checkpoint], spec: CollectSpec
    ) -> None:
        self._model, self._checkpoints, self._spec = model, checkpoints, spec
        sizes = PerExampleGradients(model).sizes
        self._sketch = SparseSketch(sizes, spec.dim, spec.nonzeros, spec.sketch_seed, compute.device)
        self._engine = FeatureEngine(model, compute, self._sketch, spec.tokens_per_batch)
        self._precision = str(compute.autocast or torch.float32).removeprefix("torch.")

    def collect(
        self, name: str, table: Table, wanted: Sequence[Preconditioner], folder: Path
    ) -> dict[str, GradientStore]:
        """Features of every row of `table` at every checkpoint, one store for each of `wanted`.

        Args:
            name: of the split, for progress.
            table: the rows.
            wanted: preconditioners.
            folder: gets one store per preconditioner, named by its label.

        Raises:
            GradientError: a loss is not finite or a gradient is zero.
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
        total = len(table) * len(self._checkpoints)
        done = total - sum(len(shards[s]) for _, s in todo)
        with Progress(f"gradients of the {name}", total, "rows", done) as progress:
            for t, checkpoint in enumerate(self._checkpoints):
                here = {s: lacking for (at, s), lacking in todo.items() if at == t}
                if not here:
                    continue
                checkpoint.load_adapter(self._model)
                state = checkpoint.adam(self._model)
                for s, lacking in here.items():
                    rows = [table[i] for i in shards[s]]
                    found = self._engine.shard(rows, shards[s].start, lacking, state, progress)
                    for kind, shard in zip(lacking, found, strict=True):
                        stores[kind].write(t, s, shard)
        return {kind.label: store for kind, store in stores.items()}

    def _create(self, folder: Path, table: Table, kind: Preconditioner) -> GradientStore:
        spec = self._spec
        origin = {
            **spec.origin,
            "data": hashlib.sha256("\n".join(row.hash for row in table).encode()).hexdigest(),
            "projection": self._sketch.describe(),
            "preconditioner": {"name": kind.name, "bias_correction": kind.bias_correction},
            "precision": self._precision,
            "tokens_per_batch": spec.tokens_per_batch,
        }
        return GradientStore.create(
            folder,
            StoreSpec(tuple(table.ids), len(self._checkpoints), spec.dim, spec.dtype, spec.shard_rows, origin),
        )


def _refuse_bad_rows(rows: Sequence[Row], norm: Tensor, loss: Tensor) -> None:
    for values, good, what in (
        (loss, loss.isfinite(), "the loss is not finite"),
        (norm, norm.isfinite() & (norm > 0), "the gradient is zero or not finite"),
    ):
        if not good.all():
            bad = [f"{rows[i].id} ({values[i]:g})" for i in (~good).nonzero()[:5, 0].tolist()]
            where = f"{rows[int((~good).nonzero()[0])].source}:{rows[int((~good).nonzero()[0])].line}"
            advice = (
                "every row is affected, so look at the model's weights and at warmup.learning_rate"
                if not good.any()
                else "remove these rows, or try model.precision: float32"
            )
            raise GradientError(
                f"{what} for {int((~good).sum())} of {len(rows)} rows: {', '.join(bad)}; first at {where}; {advice}"
            )
