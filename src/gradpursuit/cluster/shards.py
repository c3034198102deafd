"""What a worker of the pursuit is and does: it owns shards of a pool and answers for their rows."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradpursuit.cluster.errors import require_same_version
from gradpursuit.errors import StoreError
from gradpursuit.features import TrajectoryFeatures
from gradpursuit.pursuit.matrix import TrajectoryMatrix
from gradpursuit.pursuit.ranking import Place, RankedScores, scores_of
from gradpursuit.pursuit.rows import Float64Array, FloatArray, IntArray
from gradpursuit.remote import is_remote
from gradpursuit.store import ShardFolder


@dataclass(frozen=True)
class Part:
    """Rows of one shard of a store.

    Attributes:
        shards, shard: which.
        rows: int64 [n], the rows of the table that are meant, ascending.
    """

    shards: ShardFolder
    shard: int
    rows: IntArray

    def open(self) -> TrajectoryFeatures:
        """Their features at every checkpoint, memory-mapped where they lie on a disk, every byte checked.

        Raises:
            StoreError: the shard is missing or broken, or lacks one of the rows; its path is named.
        """
        found = [self.shards.read(t, self.shard, verify=True) for t in range(self.shards.checkpoints)]
        for t, shard in enumerate(found):
            if lacking := sorted(set(self.rows.tolist()).difference(shard.row.tolist())):
                raise StoreError(
                    f"{self.shards.path(t, self.shard)}: {len(lacking)} rows that are asked for are not there (first: "
                    f"{lacking[:5]}); ask for those of `GradientStore.kept()`, or collect the gradients again"
                )
        taken = [
            TrajectoryFeatures([[shard.block]]).take(np.searchsorted(shard.row, self.rows)).blocks[0] for shard in found
        ]
        return TrajectoryFeatures(taken)


def parts_of(shards: ShardFolder, rows: IntArray) -> list[Part]:
    """The parts that hold `rows` [N] of a table, ascending; shards without any are left out."""
    if not is_remote(shards.folder):  # workers are elsewhere
        shards = replace(shards, folder=shards.folder.absolute())
    cuts = np.searchsorted(rows, np.arange(0, shards.rows + shards.shard_rows, shards.shard_rows))
    pieces = [(shard, rows[start:stop]) for shard, (start, stop) in enumerate(itertools.pairwise(cuts.tolist()))]
    return [Part(shards, shard, piece) for shard, piece in pieces if len(piece)]


@dataclass(frozen=True)
class View:
    """How features of a part become atoms.

    Attributes:
        checkpoints: which are stacked.
        factor: float64 [T, n], what rows are multiplied by; None: 1.
    """

    checkpoints: tuple[int, ...]
    factor: Float64Array | None


@dataclass(frozen=True)
class Question:
    """Which rows are asked about: those of parts (by number), which have the ids from `starts` on, in a named view."""

    pool: str
    view: str
    numbers: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a pass: its number (the same one is not made twice), the score relative to the norm that does
    not count, how many rows, and the (score, id) that they come after."""

    number: int
    least: float
    count: int
    after: Place | None


@dataclass(frozen=True)
class Alone:
    """A pursuit of some rows by themselves: of at most k.

    mean_square: what `alpha` in the settings is relative to.
    """

    k: int
    mean_square: float
    settings: dict[str, Any]


class ShardWorker:
    """Owns parts of pools and answers for their rows; ids are those of the whole pool.

    threads: that its passes use. driver: the version of gradpursuit there, which must be that of every worker.
    """

    def __init__(self, threads: int, driver: str) -> None:
        import numba

        require_same_version(driver)
        os.environ["NUMBA_NUM_THREADS"] = str(threads)
        numba.config.reload_config()  # it may have been imported before
        self._parts: dict[str, dict[int, Part]] = {}
        self._opened: dict[tuple[str, int], TrajectoryFeatures] = {}
        self._views: dict[tuple[str, str], dict[int, View]] = {}
        self._matrices: dict[Question, TrajectoryMatrix] = {}
        self._ranking: tuple[tuple[Question, int], RankedScores] | None = None
        self.seconds = {"pass": 0.0, "reading": 0.0}

    def own(self, pool: str, parts: dict[int, Part]) -> None:
        """Be responsible for more parts, by number; they are opened when they are first asked about."""
        self._parts.setdefault(pool, {}).update(parts)

    def disown(self, pool: str, numbers: Sequence[int]) -> None:
        """Be responsible for parts no longer, and hold nothing of them."""
        for number in numbers:
            self._parts[pool].pop(number, None)
            self._opened.pop((pool, number), None)
        for (of, _), seen in self._views.items():
            if of == pool:
                for number in numbers:
                    seen.pop(number, None)
        self._forget(lambda asked: asked.pool == pool and not set(numbers).isdisjoint(asked.numbers))

    def see(self, pool: str, view: str, parts: dict[int, View]) -> None:
        """Know how parts, by number, are seen in a view."""
        self._views.setdefault((pool, view), {}).update(parts)

    def drop(self, pool: str, view: str) -> None:
        """Forget a view."""
        self._views.pop((pool, view), None)
        self._forget(lambda asked: (asked.pool, asked.view) == (pool, view))

    def correlate(self, asked: Question, r: FloatArray) -> Float64Array:
        """A^T r for the rows: [n] or [n, q]."""
        return self._matrix(asked).correlate(r)

    def squared_norms(self, asked: Question) -> Float64Array:
        """[n]."""
        return self._matrix(asked).squared_norms()

    def ranked(
        self, asked: Question, wanted: Wanted, r: FloatArray, excluded: IntArray
    ) -> tuple[IntArray, Float64Array]:
        """The best rows for residuals r, without those of the ids `excluded` [m]: ids and scores."""
        began, ids = time.perf_counter(), self._ids(asked)
        key = (asked, wanted.number)
        if self._ranking is None or self._ranking[0] != key:
            matrix = self._matrix(asked)
            norms = np.sqrt(matrix.squared_norms())
            reading = time.perf_counter()
            products = matrix.correlate(r)
            self.seconds["reading"] += time.perf_counter() - reading
            self._ranking = key, RankedScores(scores_of(products), norms, wanted.least)
        # Ids of the whole pool rise with places among these rows, so places settle ties as ids do.
        after = (
            None if wanted.after is None else (wanted.after[0], int(np.searchsorted(ids, wanted.after[1], "right")) - 1)
        )
        places, values = self._ranking[1].without(np.searchsorted(ids, excluded), after).next(wanted.count)
        self.seconds["pass"] += time.perf_counter() - began
        return ids[places], values

    def rows(self, asked: Question, ids: IntArray) -> FloatArray:
        """The atoms `ids` [m] as rows [m, D]."""
        return np.ascontiguousarray(self._matrix(asked).columns(self._places(asked, ids)).T)

    def combine(self, asked: Question, ids: IntArray, x: Float64Array) -> Float64Array:
        """The weighted sum of atoms: [D]."""
        return self._matrix(asked).combine(self._places(asked, ids), x)

    def winners(self, asked: Question, alone: Alone, target: Float64Array) -> IntArray:
        """The ids that a pursuit of these rows alone chooses."""
        from gradpursuit.pursuit import GradientTrajectoryPursuit

        matrix, settings = self._matrix(asked), dict(alone.settings)
        settings["alpha"] *= alone.mean_square / float(matrix.squared_norms().mean())
        solver = GradientTrajectoryPursuit(min(alone.k, matrix.shape[1]), **settings).fit(matrix, target)
        return self._ids(asked)[solver.support_]

    def timing(self) -> dict[str, float]:
        """Seconds in passes so far, and those of them that went into reading and multiplying."""
        return dict(self.seconds)

    def _forget(self, about: Callable[[Question], bool]) -> None:
        self._matrices = {asked: made for asked, made in self._matrices.items() if not about(asked)}
        if self._ranking is not None and about(self._ranking[0][0]):
            self._ranking = None

    def _matrix(self, asked: Question) -> TrajectoryMatrix:
        if asked not in self._matrices:
            seen = self._views[asked.pool, asked.view]
            views = [seen[number] for number in asked.numbers]
            opened = [self._features(asked.pool, number) for number in asked.numbers]
            blocks = [[block for features in opened for block in features.blocks[t]] for t in views[0].checkpoints]
            factors = [view.factor for view in views if view.factor is not None]
            self._matrices[asked] = TrajectoryFeatures(blocks).matrix(np.hstack(factors) if factors else None)
        return self._matrices[asked]

    def _features(self, pool: str, number: int) -> TrajectoryFeatures:
        if (pool, number) not in self._opened:
            self._opened[pool, number] = self._parts[pool][number].open()
        return self._opened[pool, number]

    def _ids(self, asked: Question) -> IntArray:
        """The ids of the rows asked about, ascending."""
        sizes = [len(self._parts[asked.pool][number].rows) for number in asked.numbers]
        return np.concatenate([np.arange(start, start + size) for start, size in zip(asked.starts, sizes, strict=True)])

    def _places(self, asked: Question, ids: IntArray) -> IntArray:
        return np.searchsorted(self._ids(asked), ids)
