"""Features of rows at one checkpoint: loss, per-example gradients, preconditioners and sketch in one backward pass.

What only needs a forward pass is in :mod:`gradpursuit.gradients.forward`.
"""

from __future__ import annotations

import gc
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gradpursuit.data import Row
from gradpursuit.errors import is_out_of_memory
from gradpursuit.gradients.layout import coordinates
from gradpursuit.gradients.per_example import PerExampleGradients
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.gradients.sketch import SparseSketch
from gradpursuit.trajectory.checkpoint import AdamState
from gradpursuit.trajectory.loss import SupervisedLoss, collate, padded_width, token_batches
from gradpursuit.trajectory.model import Compute, pad_id, trainable
from gradpursuit.trajectory.threads import side_by_side

logger = logging.getLogger("gradpursuit")
TOKENS_PER_PART = 256  # matrix products of fewer rows are slow


@dataclass(frozen=True)
class Features:
    """Of n rows: sketched `features [n, d]`, and their `norm [n]` before the sketch, all float32."""

    features: Tensor
    norm: Tensor


@dataclass(frozen=True)
class Batch:
    """What one backward pass gives.

    Attributes:
        kinds: features of the n rows for each preconditioner.
        loss: [n] float32, mean negative log-likelihood over the supervised tokens.
        tokens: [n] int64, supervised tokens.
    """

    kinds: list[Features]
    loss: Tensor
    tokens: Tensor


@dataclass
class Computed:
    """Features of a list of rows, on the CPU.

    Attributes:
        kinds, loss, tokens: as in :class:`Batch`, for the rows at `kept`.
        kept: indices into the list, increasing.
        dropped: for every other index, why it has no feature.
    """

    kinds: list[Features]
    loss: Tensor
    tokens: Tensor
    kept: list[int] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)


class RowEngine(ABC):
    """Computes something of every row in batches of rows of similar length; a batch that memory cannot hold is halved.

    Args:
        model: in evaluation mode from here on: dropout would make a feature another one each time.
        device: of the model.
        tokens_per_batch: padded tokens in one pass; halved for good when memory does not suffice.
    """

    what = "gradient"

    def __init__(self, model: nn.Module, device: torch.device, tokens_per_batch: int) -> None:
        self._model, self._device, self._budget = model.eval(), device, tokens_per_batch
        self._pad = pad_id(model)

    @property
    @abstractmethod
    def widths(self) -> list[int]:
        """Of every kind of feature that is wanted, the size d."""

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Features, losses and supervised tokens of rows in one pass, or on a CPU in one for each thread."""
        width = padded_width(max(len(row.input_ids) for row in rows))
        parts = min(torch.get_num_threads(), len(rows), max(1, len(rows) * width // TOKENS_PER_PART))
        if self._device.type != "cpu":
            parts = 1

        def work(part: int) -> Batch:
            return self._part(rows[len(rows) * part // parts : len(rows) * (part + 1) // parts], width)

        done = list(side_by_side(work, parts))
        return done[0] if parts == 1 else _joined(done)

    @abstractmethod
    def _part(self, rows: Sequence[Row], width: int) -> Batch:
        """What `batch` says, in one pass; rows are padded to `width`."""

    def compute(self, rows: Sequence[Row], on_rows: Callable[[int], None]) -> Computed:
        """Features of any number of rows, in batches of rows of similar length.

        Rows that have none are left out, with the reason: loss or feature is not finite, the feature is zero, or
        the row does not fit into memory even alone.

        Args:
            rows: of one shard.
            on_rows: told how many more rows are done.
        """
        n = len(rows)
        features = [torch.zeros(n, width) for width in self.widths]
        norms = [torch.zeros(n) for _ in self.widths]
        loss, tokens = torch.zeros(n), torch.zeros(n, dtype=torch.int32)
        dropped: dict[int, str] = {}
        queue = token_batches([len(row.input_ids) for row in rows], self._budget)
        while queue:
            indices, *queue = queue
            batch = self._try([rows[i] for i in indices])
            if batch is None and len(indices) > 1:
                queue = self._split(rows, indices, queue)
                continue
            if batch is None:
                dropped[indices[0]] = f"out of memory on {self._device} with this row alone"
            else:
                for out, norm, part in zip(features, norms, batch.kinds, strict=True):
                    out[indices], norm[indices] = part.features.cpu(), part.norm.cpu()
                loss[indices], tokens[indices] = batch.loss.cpu(), batch.tokens.to("cpu", torch.int32)
            on_rows(len(indices))
        _find_bad(dropped, loss, norms, self.what)
        kept = [i for i in range(n) if i not in dropped]
        found = [Features(f[kept], q[kept]) for f, q in zip(features, norms, strict=True)]
        return Computed(found, loss[kept], tokens[kept], kept, dropped)

    def _try(self, rows: Sequence[Row]) -> Batch | None:
        """The batch, or None if memory does not suffice."""
        try:
            return self.batch(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _split(self, rows: Sequence[Row], indices: list[int], queue: list[list[int]]) -> list[list[int]]:
        """Batches of half the size of the one that failed, for its rows and all that follow."""
        rest = indices + [i for batch in queue for i in batch]
        failed = len(indices) * padded_width(max(len(rows[i].input_ids) for i in indices))
        self._budget = failed // 2
        logger.warning(
            "out of memory on %s with %d tokens in a batch: gradients.tokens_per_batch is %d from here on",
            self._device,
            failed,
            self._budget,
        )
        batches = token_batches([len(rows[i].input_ids) for i in rest], self._budget)
        return [[rest[i] for i in batch] for batch in batches]


class FeatureEngine(RowEngine):
    """Per-example gradients of a model at its present checkpoint, preconditioned and sketched.

    The feature of a row is P Γ(∇ℓ), ℓ the mean negative log-likelihood over its supervised tokens; no learning rate is
    in it.

    Args:
        model: with a trainable adapter, or trainable weights of linear layers.
        compute: device and precision.
        sketch: of the trainable parameters, on that device.
        tokens_per_batch: padded tokens in one backward pass.
    """

    def __init__(self, model: nn.Module, compute: Compute, sketch: SparseSketch, tokens_per_batch: int) -> None:
        super().__init__(model, compute.device, tokens_per_batch)
        self._gradients = PerExampleGradients(model, compute.autocast)
        self._loss = SupervisedLoss(model, compute)
        self._sketch = sketch
        self._kinds: list[Callable[[str, Tensor], Tensor]] = []

    def prepare(self, wanted: Sequence[Preconditioner], state: AdamState) -> None:
        """Set what the batches that follow are preconditioned with; call it whenever the checkpoint changes."""
        self._kinds = [kind.at(state) for kind in wanted]

    @property
    def widths(self) -> list[int]:
        """The size of the sketch, for every preconditioner."""
        return [self._sketch.dim] * len(self._kinds)

    def _part(self, rows: Sequence[Row], width: int) -> Batch:
        """What `batch` says, in one backward pass; rows are padded to `width`."""
        sketches = [torch.zeros(len(rows), self._sketch.dim, device=self._device) for _ in self._kinds]
        squares = [torch.zeros(len(rows), device=self._device) for _ in self._kinds]
        unused = {name: parameter.numel() for name, parameter in trainable(self._model).items()}

        def consume(parameter: str, gradient: Tensor) -> None:
            unused.pop(parameter, None)
            flat = coordinates(gradient)
            for kind, out, square in zip(self._kinds, sketches, squares, strict=True):
                values = kind(parameter, flat)
                square += torch.linalg.vecdot(values, values)
                self._sketch.add(parameter, values, out)

        with self._gradients.capture(consume, len(rows)):
            losses, tokens = self._loss(collate(rows, self._pad, width))
            losses.sum().backward()
        for name, size in list(unused.items()):  # its gradient is zero, but Adam's momentum would move it all the same
            consume(name, torch.zeros(len(rows), size, device=self._device))
        features = [Features(s, q.sqrt()) for s, q in zip(sketches, squares, strict=True)]
        return Batch(features, losses.detach(), tokens)


def _joined(parts: Sequence[Batch]) -> Batch:
    """The batches as one, in their order."""
    kinds = [
        Features(torch.cat([part.features for part in kind]), torch.cat([part.norm for part in kind]))
        for kind in zip(*(part.kinds for part in parts), strict=True)
    ]
    return Batch(kinds, torch.cat([part.loss for part in parts]), torch.cat([part.tokens for part in parts]))


def _find_bad(dropped: dict[int, str], loss: Tensor, norms: list[Tensor], what: str) -> None:
    """Add the rows whose loss is not finite, or whose feature (`what`) is none."""
    for i in (~loss.isfinite()).nonzero()[:, 0].tolist():
        dropped.setdefault(i, f"the loss is {loss[i]:g}")
    for norm in norms:
        for i in (~(norm.isfinite() & (norm > 0))).nonzero()[:, 0].tolist():
            dropped.setdefault(i, f"the {what}'s norm is {norm[i]:g}")
