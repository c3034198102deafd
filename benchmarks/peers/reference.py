"""The reference way to these features, as LESS computes them (arXiv 2402.04333): one row at a time.

Autograd over all adapter parameters with a batch of one and logits for every token, Adam's direction from the flat
gradient (no bias correction, ε inside the root), and a dense Rademacher projection. The p × d matrix (20 billion
signs for SmolLM2-135M) is made anew for every group of 16 rows, 128 of its columns at a time, as LESS has it done by
TRAK's projector where there is no CUDA kernel. All in float32.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradpursuit.data import Row
from gradpursuit.trajectory.checkpoint import AdamState
from gradpursuit.trajectory.model import trainable

if TYPE_CHECKING:
    from peft import PeftModel

GROUP, COLUMNS = 16, 128


@dataclass(frozen=True)
class ReferenceTime:
    """Seconds per row, and what of the projection was measured: `blocks` of `all_blocks` blocks of columns."""

    gradient_seconds: float
    projection_seconds: float
    rows: int
    blocks: int
    all_blocks: int

    @property
    def seconds_per_row(self) -> float:
        return self.gradient_seconds + self.projection_seconds

    @property
    def rows_per_second(self) -> float:
        return 1 / self.seconds_per_row


def reference_rows_per_second(
    model: PeftModel, rows: Sequence[Row], state: AdamState, *, limit: int = 8, dim: int = 8192, blocks: int = 2
) -> ReferenceTime:
    """Time the gradients of the first `limit` rows, and `blocks` of the projection's blocks of columns.

    All blocks of a projection do the same work, so the seconds of the measured ones are scaled to all of them (the
    whole projection of 16 rows takes minutes).
    """
    chosen = rows[:limit]
    begin = time.perf_counter()
    gradients = [adam_gradient(model, row, state) for row in chosen]
    gradient_seconds = (time.perf_counter() - begin) / len(chosen)
    group = torch.stack([gradients[i % len(gradients)] for i in range(GROUP)])
    all_blocks = -(-dim // COLUMNS)
    begin = time.perf_counter()
    project(group, dim, range(min(blocks, all_blocks)))
    measured = time.perf_counter() - begin
    projection_seconds = measured * all_blocks / min(blocks, all_blocks) / GROUP
    return ReferenceTime(gradient_seconds, projection_seconds, len(chosen), min(blocks, all_blocks), all_blocks)


def adam_gradient(model: PeftModel, row: Row, state: AdamState) -> Tensor:
    """Adam's direction for one row, `[p]`."""
    parameters = trainable(model)
    ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    g = _flat(torch.autograd.grad(loss, list(parameters.values())))
    m = state.beta1 * _flat([state.m[name] for name in parameters]) + (1 - state.beta1) * g
    v = state.beta2 * _flat([state.v[name] for name in parameters]) + (1 - state.beta2) * g**2
    return m / torch.sqrt(v + state.eps)


def project(gradients: Tensor, dim: int, blocks: Sequence[int] | None = None) -> Tensor:
    """Rademacher projection of `gradients [n, p]` to `[n, dim]`; blocks of columns that are left out stay zero."""
    features = gradients.new_zeros(len(gradients), dim)
    matrix = gradients.new_empty(gradients.shape[1], min(COLUMNS, dim))
    for block in range(-(-dim // COLUMNS)) if blocks is None else blocks:
        generator = torch.Generator().manual_seed(block)
        matrix.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        columns = slice(block * COLUMNS, min((block + 1) * COLUMNS, dim))
        features[:, columns] = gradients @ matrix[:, : columns.stop - columns.start]
    return features


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
