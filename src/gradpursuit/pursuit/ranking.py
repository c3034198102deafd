"""The atoms of a pool by how much each would lower the objective, best first, as far as they are asked for."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from gradpursuit.pursuit.matrix import GradientMatrix
from gradpursuit.pursuit.rows import Float64Array, FloatArray, IntArray


class Ranking(Protocol):
    """Atoms by falling score, equal ones by id."""

    def next(self, count: int) -> tuple[IntArray, Float64Array]:
        """The next atoms, at most `count`: ids and scores [m]; fewer when there are no more."""


@runtime_checkable
class RankedMatrix(GradientMatrix, Protocol):
    """A matrix that ranks its atoms where they lie, so that scores of all N of them need not be brought together."""

    def ranking(self, r: FloatArray, least: float, excluded: IntArray) -> Ranking:
        """The ranking for the residuals r [D] or [D, q], without the atoms `excluded` [m].

        Atoms whose score is not above `least` times their norm are left out, as are those of norm zero.
        """


class RankedScores:
    """The ranking of scores at hand.

    scores, norms: float64 [N]. least, excluded: as in :meth:`RankedMatrix.ranking`.
    """

    def __init__(self, scores: Float64Array, norms: Float64Array, least: float, excluded: IntArray) -> None:
        eligible = (norms > 0) & (scores > least * norms)
        eligible[excluded] = False
        ids = np.flatnonzero(eligible)
        self._ids: IntArray = ids[np.argsort(-scores[ids], kind="stable")]
        self._scores = scores[self._ids]
        self._given = 0

    def next(self, count: int) -> tuple[IntArray, Float64Array]:
        """As :meth:`Ranking.next`."""
        part = slice(self._given, self._given + count)
        self._given += count
        return self._ids[part], self._scores[part]

    def after(self, score: float, id_: int) -> None:
        """Go on with the first atom that comes after one of this score and id."""
        first, last = np.searchsorted(-self._scores, -score, "left"), np.searchsorted(-self._scores, -score, "right")
        self._given = int(first + np.searchsorted(self._ids[first:last], id_, "right"))


def scores_of(products: Float64Array) -> Float64Array:
    """How much each atom would lower the objective, of its products with residuals: [N], or ‖(·)₊‖ of [N, q]."""
    if products.ndim == 1:
        return products
    return np.sqrt((np.maximum(products, 0.0) ** 2).mean(axis=1))
