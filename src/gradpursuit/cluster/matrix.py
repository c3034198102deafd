"""The matrix of a pursuit whose rows lie on the workers of a cluster; the answer is that of one machine.

Of a pass the residuals go out, and from every worker its best (id, score) pairs come back; columns are fetched when
they are candidates. A worker multiplies its rows as one machine does, row by row, so scores are the same to the last
bit whatever the number of workers and whoever owns a shard, if their processors have the same instructions; where they
have not, to rounding (1e-6 of the norms).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpursuit.cluster.shards import Alone, Part, Question, Wanted, parts_of
from gradpursuit.cluster.team import Ownership, Team, shares
from gradpursuit.features import TrajectoryFeatures
from gradpursuit.pursuit.matrix import as_ids, require_finite
from gradpursuit.pursuit.ranking import Place
from gradpursuit.pursuit.rows import Float64Array, FloatArray, IntArray
from gradpursuit.store import DTYPES

_PAIR = 16  # bytes of an id and a score

Asking = Callable[[Any, Question], Any]  # (actor, question) -> the reference of its answer


@dataclass
class Pass:
    """What one pass moved: bytes of residuals and of ids left out that went to workers, pairs that came back, columns
    fetched after it."""

    residual_bytes: int = 0
    excluded_bytes: int = 0
    pairs: int = 0
    columns: int = 0


@dataclass
class Traffic:
    """What a matrix moved between driver and workers.

    other_bytes: of norms, factors and ids of winners, and of scores of all atoms where a solver asked for them.
    """

    passes: list[Pass] = field(default_factory=list)
    column_bytes: int = 0
    other_bytes: int = 0

    def describe(self) -> dict[str, Any]:
        """Totals, and the passes one by one, as JSON values."""
        made = [asdict(one) for one in self.passes]
        totals = {name: sum(one[name] for one in made) for name in asdict(Pass())}
        back = _PAIR * totals["pairs"] + self.column_bytes
        return {
            **totals,
            "column_bytes": self.column_bytes,
            "other_bytes": self.other_bytes,
            "bytes_out": totals["residual_bytes"] + totals["excluded_bytes"],
            "bytes_back": back,
            "passes": made,
        }


class ClusterFeatures(TrajectoryFeatures):
    """Features of N rows at T checkpoints that workers own, and that are not brought together.

    team: the workers. parts: of one store, in the order of their rows. owners: to which member each part goes first
    (None: shared out evenly). columns: as of :class:`TrajectoryFeatures`.
    """

    def __init__(
        self,
        team: Team,
        parts: Sequence[Part],
        owners: Sequence[int] | None = None,
        columns: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> None:
        super().__init__([], columns)
        self._owned = Ownership(team, parts, owners)
        self._single: dict[int, RayGradientMatrix] = {}

    @property
    def checkpoints(self) -> int:
        """T."""
        return self._owned.parts[0].shards.checkpoints

    @property
    def width(self) -> int:
        """As :attr:`TrajectoryFeatures.width`."""
        return self.checkpoints * self._owned.parts[0].shards.dim

    @property
    def nbytes(self) -> int:
        """As :attr:`TrajectoryFeatures.nbytes`."""
        return len(self) * self.width * DTYPES[self._owned.parts[0].shards.dtype].itemsize

    def __len__(self) -> int:
        return int(self._owned.starts[-1])

    def matrix(self, factor: Float64Array | None = None) -> RayGradientMatrix:  # type: ignore[override]
        """The features of all checkpoints stacked [D, N], row i of checkpoint t times `factor[t, i]`."""
        return RayGradientMatrix(self._owned, tuple(range(self.checkpoints)), factor)

    def at(self, checkpoint: int) -> Float64Array:
        """As :meth:`TrajectoryFeatures.at`: all rows are brought together."""
        return self.some(checkpoint, np.arange(len(self)))

    def take(self, rows: IntArray) -> TrajectoryFeatures:
        """As :meth:`TrajectoryFeatures.take`; their shards are shared out anew."""
        owned = self._owned
        of_table = np.concatenate([part.rows for part in owned.parts])[rows]
        parts = parts_of(owned.parts[0].shards, of_table)
        return ClusterFeatures(owned.team, parts, columns={name: one[:, rows] for name, one in self.columns.items()})

    def _at(self, checkpoint: int) -> RayGradientMatrix:  # type: ignore[override]
        if checkpoint not in self._single:
            self._single[checkpoint] = RayGradientMatrix(self._owned, (checkpoint,))
        return self._single[checkpoint]


class RayGradientMatrix:
    """A [D, N] of parts that workers own: their features at some checkpoints, stacked.

    :class:`ClusterFeatures` makes it.

    factor: float64 [T, N], what row i of checkpoint t is multiplied by; None: 1.

    The driver holds N norms and the columns that are fetched, a worker its own parts; nobody holds the whole. A worker
    that dies is replaced by another that opens its shards, and only what it had not answered is asked again.

    Raises :class:`StoreError` where a shard cannot be read (its path is named), :class:`RunError` where workers keep
    dying, and :class:`PursuitError` as :class:`TrajectoryMatrix` does.
    """

    def __init__(self, owned: Ownership, checkpoints: tuple[int, ...], factor: Float64Array | None = None) -> None:
        self._owned, self._view = owned, owned.add_view(checkpoints, factor)
        shards = owned.parts[0].shards
        self._shape = (len(checkpoints) * shards.dim, int(owned.starts[-1]))
        self._row_bytes = shards.dim * DTYPES[shards.dtype].itemsize * len(checkpoints)
        self._squared_norms: Float64Array | None = None
        self._numbers = itertools.count()
        weakref.finalize(self, owned.drop_view, self._view).atexit = False
        self.traffic = Traffic(other_bytes=0 if factor is None else factor.nbytes)

    @property
    def shape(self) -> tuple[int, int]:
        """(D, N)."""
        return self._shape

    @property
    def nbytes(self) -> int:
        """Bytes that one pass reads, on all workers together."""
        return self._shape[1] * self._row_bytes

    @property
    def workers(self) -> int:
        """How many own a part of it."""
        return self._owned.workers

    def correlate(self, r: FloatArray) -> Float64Array:
        """A^T r for r [D]: float64 [N], or for r [D, q]: [N, q]; one pass, after which all N come back."""
        wide = np.asarray(r, dtype=np.float64)
        out = np.empty((self.shape[1], *wide.shape[1:]))
        one_pass = self.begin_pass(wide)
        for numbers, found in self.ask(
            lambda actor, asked: actor.correlate.remote(asked, one_pass.residual(actor, asked))
        ):
            out[self._ids(numbers)] = found
            self.traffic.other_bytes += found.nbytes
        return out

    def ranking(self, r: FloatArray, least: float) -> RemoteRanking:
        """As :meth:`gradpursuit.pursuit.ranking.RankedMatrix.ranking`; the pass is made when atoms are asked for."""
        return RemoteRanking(self, self.begin_pass(np.asarray(r, dtype=np.float64)), least)

    def columns(self, ids: IntArray) -> FloatArray:
        """The atoms `ids` [m] as an array [D, m] (the transposed view of contiguous rows [m, D])."""
        ids = as_ids(ids, self.shape[1])
        atoms = np.empty((len(ids), self.shape[0]), dtype=np.float32)
        part = self._part_of(ids)
        asking = self.ask(
            lambda actor, asked: actor.rows.remote(asked, ids[_among(part, asked.numbers)]), np.unique(part)
        )
        for numbers, found in asking:
            atoms[_among(part, numbers)] = found
            self.traffic.column_bytes += found.nbytes
        if self.traffic.passes:
            self.traffic.passes[-1].columns += len(ids)
        return atoms.T

    def combine(self, ids: IntArray, x: FloatArray) -> Float64Array:
        """Weighted sum of atoms, float64 [D]."""
        ids, x = as_ids(ids, self.shape[1]), np.asarray(x, dtype=np.float64)
        part = self._part_of(ids)

        def combined(actor: Any, asked: Question) -> Any:
            mine = _among(part, asked.numbers)
            return actor.combine.remote(asked, ids[mine], x[mine])

        sums = dict(self.ask(combined, np.unique(part)))
        self.traffic.other_bytes += 8 * self.shape[0] * len(sums)
        return sum((sums[numbers] for numbers in sorted(sums)), np.zeros(self.shape[0]))

    def squared_norms(self) -> Float64Array:
        """Squared Euclidean norm of every atom: float64 [N]; the first call is one pass over the data."""
        if self._squared_norms is None:
            norms = np.empty(self.shape[1])
            for numbers, found in self.ask(lambda actor, asked: actor.squared_norms.remote(asked)):
                norms[self._ids(numbers)] = found
                self.traffic.other_bytes += found.nbytes
            self._squared_norms = require_finite(norms)
        return self._squared_norms

    def winners(self, target: Float64Array, k: int, parts: int, settings: Mapping[str, Any]) -> IntArray:
        """What `parts` pursuits of neighbouring shards choose, each by itself, at most k; ids [m], ascending.

        All shards of a part go to one worker, which must have room for them. It counts as one pass.

        settings: of :class:`GradientTrajectoryPursuit`; `alpha` is relative to the mean over all atoms.
        """
        given = shares([len(part.rows) for part in self._owned.parts], parts)
        groups = [[number for number, one in enumerate(given) if one == group] for group in sorted(set(given))]
        alone = Alone(k, float(self.squared_norms().mean()), dict(settings))
        one = self.begin_pass(np.asarray(target, dtype=np.float64))

        def pursued(actor: Any, numbers: tuple[int, ...]) -> Any:
            asked = self._question(numbers)
            return actor.winners.remote(asked, alone, one.residual(actor, asked))

        chosen = np.sort(np.concatenate([found for _, found in self._owned.ask(pursued, together=groups)]))
        self.traffic.other_bytes += chosen.nbytes
        return chosen

    def begin_pass(self, r: Float64Array) -> OnePass:
        """Start to count a pass, and put its residuals where workers find them."""
        import ray

        self.traffic.passes.append(Pass())
        return OnePass(next(self._numbers), ray.put(r), r.nbytes, self.traffic.passes[-1])

    def ask(self, ask: Asking, numbers: Iterable[int] | None = None) -> Iterator[tuple[tuple[int, ...], Any]]:
        """As :meth:`Ownership.ask`, with the question that names the parts."""
        wanted = None if numbers is None else [int(number) for number in numbers]
        return self._owned.ask(lambda actor, mine: ask(actor, self._question(mine)), wanted)

    def excluded_of(self, excluded: IntArray, asked: Question) -> IntArray:
        """Those of the ids `excluded` [m] that are among the rows asked about."""
        return excluded[_among(self._part_of(excluded), asked.numbers)]

    def _question(self, numbers: tuple[int, ...]) -> Question:
        return Question(
            self._owned.pool, self._view, numbers, tuple(int(self._owned.starts[number]) for number in numbers)
        )

    def _ids(self, numbers: tuple[int, ...]) -> IntArray:
        return np.concatenate(
            [np.arange(self._owned.starts[number], self._owned.starts[number + 1]) for number in numbers]
        )

    def _part_of(self, ids: IntArray) -> IntArray:
        return np.searchsorted(self._owned.starts, ids, side="right") - 1


@dataclass
class OnePass:
    """A pass under way: its number, the reference of its residuals and their size, and what it has moved."""

    number: int
    reference: Any
    size: int
    moved: Pass
    _sent: set[tuple[Any, Question]] = field(default_factory=set)

    def residual(self, actor: Any, asked: Question) -> Any:
        """The residuals for whoever is asked; sent once."""
        if (actor, asked) not in self._sent:
            self._sent.add((actor, asked))
            self.moved.residual_bytes += self.size
        return self.reference


@dataclass(frozen=True)
class RemoteRanking:
    """The ranking of atoms that lie on workers."""

    matrix: RayGradientMatrix
    made: OnePass
    least: float

    def without(self, excluded: IntArray) -> RemoteAtoms:
        """As :meth:`gradpursuit.pursuit.ranking.Ranking.without`."""
        return RemoteAtoms(self, np.sort(as_ids(excluded, self.matrix.shape[1])))


class RemoteAtoms:
    """Every worker is asked for as many of its best atoms as are wanted, and they merge."""

    def __init__(self, ranking: RemoteRanking, excluded: IntArray) -> None:
        self._of, self._excluded = ranking, excluded
        self._after: Place | None = None

    def next(self, count: int) -> tuple[IntArray, Float64Array]:
        """As :meth:`gradpursuit.pursuit.ranking.Ranked.next`."""
        matrix, one = self._of.matrix, self._of.made
        wanted = Wanted(one.number, self._of.least, count, self._after)
        ids, scores = [np.empty(0, dtype=np.int64)], [np.empty(0)]

        def ranked(actor: Any, asked: Question) -> Any:
            excluded = matrix.excluded_of(self._excluded, asked)
            one.moved.excluded_bytes += excluded.nbytes
            return actor.ranked.remote(asked, wanted, one.residual(actor, asked), excluded)

        for _, (some, their_scores) in matrix.ask(ranked):
            one.moved.pairs += len(some)
            ids.append(some)
            scores.append(their_scores)
        every, values = np.concatenate(ids), np.concatenate(scores)
        best = np.lexsort((every, -values))[:count]
        if best.size:
            self._after = float(values[best[-1]]), int(every[best[-1]])
        return every[best], values[best]


def _among(part: IntArray, numbers: tuple[int, ...]) -> IntArray:
    """The places whose part is one of `numbers`."""
    return np.flatnonzero(np.isin(part, numbers))
