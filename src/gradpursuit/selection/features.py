"""Stored features as the strategies see them, and the matching problem made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpursuit.errors import SelectionError
from gradpursuit.pursuit import TrajectoryMatrix
from gradpursuit.store import Block

Array = NDArray[np.float64]


class TrajectoryFeatures:
    """Features of n rows at T checkpoints, in memory or memory-mapped.

    Args:
        blocks: for each checkpoint its shards `[n_s, d]`, in row order: blocks of a store, of any type and with their
            scales, or arrays of float16, float32 or float64.
    """

    def __init__(self, blocks: Sequence[Sequence[Block | NDArray[Any]]]) -> None:
        self.blocks = [[b if isinstance(b, Block) else Block(np.asarray(b)) for b in shards] for shards in blocks]

    @property
    def checkpoints(self) -> int:
        """T."""
        return len(self.blocks)

    def __len__(self) -> int:
        """The number of rows n."""
        return sum(map(len, self.blocks[0]))

    def matrix(self, factor: Array | None = None) -> TrajectoryMatrix:
        """The features of all checkpoints stacked [D, n], row i of checkpoint t times `factor[t, i]`."""
        scale = np.stack([_scales(shards) for shards in self.blocks])
        values = [[block.values for block in shards] for shards in self.blocks]
        return TrajectoryMatrix(values, scale if factor is None else scale * factor)

    def take(self, rows: NDArray[np.int64]) -> TrajectoryFeatures:
        """The features of `rows` (ascending positions) alone: views of the same memory, cut where a row is left out."""
        cuts = []
        starts = np.cumsum([0, *(len(shard) for shard in self.blocks[0])])
        for shard, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
            inside = rows[(rows >= start) & (rows < stop)] - start
            runs = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
            cuts += [(shard, int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]
        return TrajectoryFeatures([[_cut(shards[s], start, stop) for s, start, stop in cuts] for shards in self.blocks])

    def norms(self) -> Array:
        """Euclidean norm of every row at every checkpoint, float64 [T, n]."""
        return np.sqrt([self._at(t).squared_norms() for t in range(self.checkpoints)])

    def at(self, checkpoint: int) -> Array:
        """All rows at one checkpoint, float64 [n, d]; meant for targets, which are small."""
        return np.concatenate([np.asarray(block, dtype=np.float64) for block in self.blocks[checkpoint]])

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
        return self._at(checkpoint).correlate(direction)

    def _at(self, checkpoint: int) -> TrajectoryMatrix:
        return TrajectoryFeatures([self.blocks[checkpoint]]).matrix()


def _cut(block: Block, start: int, stop: int) -> Block:
    scale = None if block.scale is None else block.scale[start:stop]
    return Block(block.values[start:stop], scale)


def _scales(shards: Sequence[Block]) -> Array:
    """The factor of every row of one checkpoint, float64 [n]."""
    return np.concatenate([np.ones(len(b)) if b.scale is None else b.scale.astype(np.float64) for b in shards])


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
    factor = np.repeat(block[:, None], len(pool), axis=1)
    if unit:
        factor = factor / pool.norms()
    return pool.matrix(factor), (block[:, None] * target).ravel()
