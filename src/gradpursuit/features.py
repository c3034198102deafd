"""Stored features as the strategies see them, and the matching problem made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpursuit.errors import SelectionError
from gradpursuit.pursuit.matrix import TrajectoryMatrix
from gradpursuit.store import Block

Array = NDArray[np.float64]


class TrajectoryFeatures:
    """Features of n rows at T checkpoints, in memory or memory-mapped.

    Args:
        blocks: for each checkpoint its shards `[n_s, d]`, in row order: blocks of a store, of any type and with their
            scales, or arrays of float16, float32 or float64.
        columns: what else is known of every row at every checkpoint, [T, n]: `norm` of the feature before projection,
            `loss` of the row.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Block | NDArray[Any]]],
        columns: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> None:
        self.blocks = [[b if isinstance(b, Block) else Block(np.asarray(b)) for b in shards] for shards in blocks]
        self.columns = dict(columns)

    @property
    def checkpoints(self) -> int:
        """T."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """D: numbers of a row, at all checkpoints together."""
        return sum(shards[0].shape[1] for shards in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows at all checkpoints, as stored."""
        return sum(block.values.nbytes for shards in self.blocks for block in shards)

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
        blocks = [[_cut(shards[s], start, stop) for s, start, stop in cuts] for shards in self.blocks]
        return TrajectoryFeatures(blocks, {name: values[:, rows] for name, values in self.columns.items()})

    def norms(self) -> Array:
        """Euclidean norm of every row at every checkpoint, float64 [T, n]."""
        return np.sqrt([self._at(t).squared_norms() for t in range(self.checkpoints)])

    def at(self, checkpoint: int) -> Array:
        """All rows at one checkpoint, float64 [n, d]; meant for targets, which are small."""
        return np.concatenate([np.asarray(block, dtype=np.float64) for block in self.blocks[checkpoint]])

    def some(self, checkpoint: int, rows: NDArray[np.int64]) -> Array:
        """The `rows` [m] at one checkpoint, float64 [m, d]."""
        return self._at(checkpoint).columns(rows).T.astype(np.float64)

    def group_means(self, groups: NDArray[np.int64], *, unit: bool = False) -> Array:
        """At every checkpoint the mean over each group's rows (`unit`: each divided by its norm): [T, q, d].

        Groups are in ascending order of their numbers; what is large is read where it lies.
        """
        every = [np.flatnonzero(groups == name) for name in np.unique(groups)]
        norms = self.norms() if unit else np.ones((self.checkpoints, len(self)))
        means = [[self._at(t).combine(ids, 1 / (len(ids) * norms[t, ids])) for ids in every] for t in range(len(norms))]
        return np.array(means)

    def group_mean(self, groups: NDArray[np.int64]) -> Array:
        """g [T, d]: at every checkpoint the mean over groups of the mean over each group's rows."""
        return self.group_means(groups).mean(axis=1)

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
    pool: TrajectoryFeatures, target: Array, rates: Array, *, norms: Array | None, balance: bool
) -> tuple[TrajectoryMatrix, Array]:
    """Stack the checkpoints: A = [s_t √η_t U_tᵀ]_t and b = [s_t √η_t g_t]_t, D = T·d.

    Args:
        pool: features of the N pool rows.
        target: g [T, d], or of several groups [T, q, d].
        rates: η [T], learning rates; 0 where a checkpoint does not count.
        norms: [T, N], what each U_t[i] is divided by (not if it is zero, as the row then is too); None: 1.
        balance: s_t = 1 / ‖g_t‖ (of several groups: of their mean), so that every checkpoint counts alike; otherwise 1.

    Returns:
        A [D, N] and b [D], or of several groups [D, q].

    Raises:
        SelectionError: the target's mean gradient is zero at some checkpoint.
    """
    lengths = np.linalg.norm(target if target.ndim == 2 else target.mean(axis=1), axis=1)
    if (lost := (lengths == 0) & (rates > 0)).any():
        raise SelectionError(
            f"the mean gradient of the target is zero at checkpoint {int(np.argmax(lost)) + 1}: "
            "its examples cancel or are already fitted exactly"
        )
    block = np.sqrt(rates) / (np.where(lengths > 0, lengths, 1.0) if balance else 1.0)
    factor = np.repeat(block[:, None], len(pool), axis=1)
    if norms is not None:
        factor = np.divide(factor, norms, out=np.zeros_like(factor), where=norms > 0)
    stacked = np.moveaxis(target, -1, 1) * block.reshape(-1, *[1] * (target.ndim - 1))  # [T, d] or [T, d, q]
    return pool.matrix(factor), stacked.reshape(-1, *stacked.shape[2:])
