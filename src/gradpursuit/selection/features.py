"""Stored features as the strategies see them, and the matching problem made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpursuit.errors import SelectionError
from gradpursuit.pursuit import TrajectoryMatrix

Array = NDArray[np.float64]


class TrajectoryFeatures:
    """Features of n rows at T checkpoints, in memory or memory-mapped.

    Args:
        blocks: for each checkpoint its shards `[n_s, d]` (float16 or float32), in row order.
    """

    def __init__(self, blocks: Sequence[Sequence[NDArray[Any]]]) -> None:
        self.blocks = [list(shards) for shards in blocks]

    @property
    def checkpoints(self) -> int:
        """T."""
        return len(self.blocks)

    def take(self, rows: NDArray[np.int64]) -> TrajectoryFeatures:
        """The features of `rows` (ascending positions) alone: views of the same memory, cut where a row is left out."""
        cuts = []
        starts = np.cumsum([0, *(len(shard) for shard in self.blocks[0])])
        for shard, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            inside = rows[(rows >= start) & (rows < stop)] - start
            runs = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
            cuts += [(shard, int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
        return TrajectoryFeatures([[shards[s][start:stop] for s, start, stop in cuts] for shards in self.blocks])

    def norms(self) -> Array:
        """Euclidean norm of every row at every checkpoint, float64 [T, n]."""
        return np.sqrt(
            [np.concatenate([np.einsum("nd,nd->n", s, s, dtype=np.float64) for s in shards]) for shards in self.blocks]
        )

    def at(self, checkpoint: int) -> Array:
        """All rows at one checkpoint, float64 [n, d]; meant for targets, which are small."""
        return np.concatenate([np.asarray(shard, dtype=np.float64) for shard in self.blocks[checkpoint]])

    def group_mean(self, groups: NDArray[np.int64]) -> Array:
        """g [T, d]: at every checkpoint the mean over groups of the mean over each group's rows."""
        names = np.unique(groups)
        return np.stack(
            [
                np.mean([self.at(t)[groups == name].mean(axis=0) for name in names], axis=0)
                for t in range(self.checkpoints)
            ]
        )

    def dot(self, checkpoint: int, direction: Array) -> Array:
        """Inner products of every row at one checkpoint with `direction [d, q]`: float64 [n, q]."""
        return np.concatenate(
            [np.asarray(shard, dtype=np.float32) @ direction.astype(np.float32) for shard in self.blocks[checkpoint]]
        ).astype(np.float64)


def pursuit_problem(
    pool: TrajectoryFeatures, target: Array, rates: Array, *, unit: bool, balance: bool
) -> tuple[TrajectoryMatrix, Array]:
    """Stack the checkpoints: A = [s_t √η_t U_tᵀ]_t and b = [s_t √η_t g_t]_t, D = T·d.

    Args:
        pool: features of the N pool rows.
        target: g [T, d].
        rates: η [T], learning rates.
        unit: divide each U_t[i] by its norm.
        balance: s_t = 1 / ‖g_t‖, so that every checkpoint counts alike; otherwise 1.

    Raises:
        SelectionError: the target's mean gradient is zero at some checkpoint.
    """
    lengths = np.linalg.norm(target, axis=1)
    if not (lengths > 0).all():
        raise SelectionError(
            f"the mean gradient of the target is zero at checkpoint {int(np.argmin(lengths)) + 1}: "
            "its examples cancel or are already fitted exactly"
        )
    block = np.sqrt(rates) / (lengths if balance else 1.0)
    scale = np.repeat(block[:, None], sum(len(shard) for shard in pool.blocks[0]), axis=1)
    if unit:
        scale = scale / pool.norms()
    return TrajectoryMatrix(pool.blocks, scale), (block[:, None] * target).ravel()
