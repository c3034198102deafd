"""The atoms of a pool by how much each would lower the objective, best first, as far as they are asked for."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from gradpursuit.pursuit.matrix import GradientMatrix
from gradpursuit.pursuit.rows import Float64Array, FloatArray, IntArray

Place = tuple[float, int]  # score and id of an atom: where a ranking goes on


class Ranked(Protocol):
    """Atoms by falling score, equal ones by id, from the first on."""

    def next(self, count: int) -> tuple[IntArray, Float64Array]:
        """The next atoms, at most `count`: ids and scores [m]; fewer when there are no more."""


class Ranking(Protocol):
    """What one pass found."""

    def without(self, excluded: IntArray) -> Ranked:
        """All atoms that count but `excluded` [m]; it may be asked several times."""


@runtime_checkable
class RankedMatrix(GradientMatrix, Protocol):
    """A matrix that ranks its atoms where they lie, so that scores of all N of them need not be brought together."""

    def ranking(self, r: FloatArray, least: float) -> Ranking:
        """The ranking for the residuals r [D] or [D, q].

        Atoms whose score is not above `least` times their norm do not count, nor do those of norm zero.
        """


class RankedScores:
    """The ranking of scores at hand.

    scores, norms: float64 [N]. least: as in :meth:`RankedMatrix.ranking`.
    """

    def __init__(self, scores: Float64Array, norms: Float64Array, least: float) -> None:
        self._scores, self._counts = scores, (norms > 0) & (scores > least * norms)

    def without(self, excluded: IntArray, after: Place | None = None) -> RankedAtoms:
        """As :meth:`Ranking.without`; after: only those that come after it."""
        counts = self._counts.copy()
        counts[excluded] = False
        ids = np.flatnonzero(counts)
        return RankedAtoms(ids, self._scores[ids], after)


class RankedAtoms:
    """Atoms `ids` [m], ascending, by their `scores` [m]; what is not asked for is not sorted."""

    def __init__(self, ids: IntArray, scores: Float64Array, after: Place | None = None) -> None:
        self._ids, self._scores, self._after = ids, scores, after

    def next(self, count: int) -> tuple[IntArray, Float64Array]:
        """As :meth:`Ranked.next`."""
        ids, scores = self._ids, self._scores
        if self._after is not None:
            score, last = self._after
            left = (scores < score) | ((scores == score) & (ids > last))
            ids, scores = ids[left], scores[left]
        if len(ids) > count:
            least = np.partition(scores, len(ids) - count)[len(ids) - count]
            ids, scores = ids[scores >= least], scores[scores >= least]
        order = np.argsort(-scores, kind="stable")[:count]
        ids, scores = ids[order], scores[order]
        if len(ids):
            self._after = float(scores[-1]), int(ids[-1])
        return ids, scores


def scores_of(products: Float64Array) -> Float64Array:
    """How much each atom would lower the objective, of its products with residuals: [N], or ‖(·)₊‖ of [N, q]."""
    if products.ndim == 1:
        return products
    return np.sqrt((np.maximum(products, 0.0) ** 2).mean(axis=1))
