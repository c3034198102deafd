"""The weights of a support: non-negative least squares on held columns, by their Gram matrix or without it."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from gradpursuit.pursuit.held import HeldColumns, pieces
from gradpursuit.pursuit.matrix import Float64Array, FloatArray, IntArray
from gradpursuit.pursuit.newton import Columns, nnls_columns
from gradpursuit.pursuit.nnls import kkt_violation, nnls

EXACT = 1e-10  # the violation that a Gram matrix in float64 can reach
_NO_IDS: IntArray = np.empty(0, dtype=np.int64)


class Refit(Protocol):
    """Fits weights on held columns to the targets [D, q], each target on its own."""

    def solve(
        self, ids: IntArray, start: Float64Array, ridge: float, tol: float
    ) -> tuple[Float64Array, Float64Array, float]:
        """Weights [m, q] on `ids` [m] with zeros, residuals [D, q], and the largest KKT violation.

        start: weights [m, q] to begin from. tol: the violation to reach.
        """


class GramRefit:
    """By the Gram matrix of all held columns, in float64, of which only new products are ever computed.

    The exact and, up to some two thousand columns, the fastest way: time grows with their square.
    """

    def __init__(self, held: HeldColumns, targets: Float64Array) -> None:
        self._held, self._targets = held, targets
        self._serials = _NO_IDS
        self._gram = np.empty((0, 0))

    def gram(self, ids: IntArray, others: IntArray | None = None) -> Float64Array:
        """Products of the held columns `ids` [m] with `others` (default: themselves): float64 [m, n]."""
        self._follow()
        slots = self._held.slots(ids)
        return self._gram[np.ix_(slots, slots if others is None else self._held.slots(others))]

    def solve(
        self, ids: IntArray, start: Float64Array, ridge: float, tol: float
    ) -> tuple[Float64Array, Float64Array, float]:
        """As in :class:`Refit`; always to :data:`EXACT`, which costs no more."""
        gram, atb = self.gram(ids), self._held.atb(ids)
        results = [
            nnls(gram, q, ridge=ridge, start=x, tol=min(tol, EXACT)) for q, x in zip(atb.T, start.T, strict=True)
        ]
        x = np.stack([result.x for result in results], axis=1)
        return x, self.residual(ids, x), max(result.kkt for result in results)

    def violation(self, ids: IntArray, x: Float64Array, ridge: float) -> float:
        """The largest KKT violation of weights x [m, q] on held columns `ids` [m]."""
        gram, atb = self.gram(ids), self._held.atb(ids)
        return max(kkt_violation(gram, q, w, ridge) for q, w in zip(atb.T, x.T, strict=True))

    def residual(self, ids: IntArray, x: Float64Array) -> Float64Array:
        """b - A x for each target: float64 [D, q]."""
        r, slots = self._targets.copy(), self._held.slots(ids)
        for piece in pieces(len(ids), 8 * len(r)):
            r -= self._held.entries(slots[piece]).T.astype(np.float64, copy=False) @ x[piece]
        return r

    def _follow(self) -> None:
        """Let go of the products of columns that are held no more, and form those of new ones."""
        serials = self._held.serials
        known = np.flatnonzero(np.isin(self._serials, serials))
        if len(known) < len(self._serials):
            self._gram = self._gram[np.ix_(known, known)]
        before, total = len(known), len(serials)
        self._serials = serials
        if total == before:
            return
        if total > len(self._gram):
            larger = np.empty((max(total, min(2 * before, total + 1024)),) * 2)
            larger[:before, :before] = self._gram[:before, :before]
            self._gram = larger
        new = slice(before, total)
        self._gram[new, :total] = _products(self._held.entries(new), self._held.entries(slice(total)))
        self._gram[:before, new] = self._gram[new, :before].T


class NewtonRefit:
    """By projected Newton steps on the columns themselves: time grows with their number, no memory beyond them."""

    def __init__(self, held: HeldColumns, targets: Float64Array, norms: Float64Array) -> None:
        self._held, self._targets, self._norms = held, targets, norms

    def solve(
        self, ids: IntArray, start: Float64Array, ridge: float, tol: float
    ) -> tuple[Float64Array, Float64Array, float]:
        """As in :class:`Refit`."""
        lengths = np.sqrt(self._norms[ids] ** 2 + ridge)
        columns = Columns(self._held.rows(), self._held.slots(ids), ridge, lengths)
        solved = [
            nnls_columns(columns, b, q, x, tol)
            for b, q, x in zip(self._targets.T, self._held.atb(ids).T, start.T, strict=True)
        ]
        x = np.stack([result.x for result, _ in solved], axis=1)
        return x, np.stack([r for _, r in solved], axis=1), max(result.kkt for result, _ in solved)


def _products(rows: FloatArray, others: FloatArray) -> Float64Array:
    """rows [m, D] times others [n, D]^T in float64, widening a bounded number of entries at a time."""
    total = np.zeros((len(rows), len(others)))
    for piece in pieces(rows.shape[1], 8 * (len(rows) + len(others))):
        left = rows[:, piece].astype(np.float64, copy=False)
        total += left @ others[:, piece].astype(np.float64, copy=False).T
    return total
