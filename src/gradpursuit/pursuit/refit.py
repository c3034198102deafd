"""The weights of a support: non-negative least squares on held columns, by their Gram matrix or without it."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import numpy as np

from gradpursuit.pursuit.held import HeldColumns, pieces
from gradpursuit.pursuit.matrix import Float64Array, FloatArray, IntArray
from gradpursuit.pursuit.newton import Columns, Tolerance, nnls_columns
from gradpursuit.pursuit.nnls import kkt_violation, nnls

logger = logging.getLogger("gradpursuit")

EXACT = 1e-10  # the violation that a Gram matrix in float64 can reach
_OPTIMAL = 1e-5  # a larger violation is not called optimal
_DIRECTIONS = 64  # of the preconditioner
_NO_IDS: IntArray = np.empty(0, dtype=np.int64)


class Refit(Protocol):
    """Fits weights on held columns to the targets [D, q], each target on its own."""

    def solve(
        self, ids: IntArray, start: Float64Array, ridge: float, tol: Tolerance
    ) -> tuple[Float64Array, Float64Array, float]:
        """Weights [m, q] on `ids` [m] with zeros, residuals [D, q], and the largest KKT violation.

        start: weights [m, q] to begin from. tol: how exact.
        """


class HeldGram:
    """The products of all held columns with one another, of which only new ones are ever computed.

    dtype: float64, or float32 where that is enough: half the time, half the memory.
    """

    def __init__(self, held: HeldColumns, dtype: type[np.floating[Any]]) -> None:
        self._held, self._dtype, self._serials = held, dtype, _NO_IDS
        self._gram: FloatArray = np.empty((0, 0), dtype)

    def all(self) -> FloatArray:
        """By slot [m, m]; those of free slots mean nothing."""
        count = len(self._held.ids)
        if count < len(self._serials):  # everything was released since
            self._serials, self._gram = _NO_IDS, np.empty((0, 0), self._dtype)
        if count > len(self._gram):
            used, room = len(self._serials), max(count, min(2 * len(self._gram), count + 1024))
            larger = np.zeros((room, room), self._dtype)
            larger[:used, :used] = self._gram[:used, :used]
            self._gram = larger
        new = _changed(self._serials, self._held.serials)
        self._serials = self._held.serials.copy()
        if new.size:
            products = _products(self._held.entries(new), self._held.entries(slice(count)), self._dtype)
            self._gram[new, :count] = products
            self._gram[:count, new] = products.T
        return self._gram[:count, :count]


class GramRefit:
    """By the Gram matrix of all held columns in float64.

    The exact and, up to some hundred columns, the fastest way: time grows with the cube of their number.
    """

    def __init__(self, held: HeldColumns, targets: Float64Array) -> None:
        self._held, self._targets, self._gram = held, targets, HeldGram(held, np.float64)

    def gram(self, ids: IntArray, others: IntArray | None = None) -> Float64Array:
        """Products of the held columns `ids` [m] with `others` (default: themselves): float64 [m, n]."""
        slots = self._held.slots(ids)
        places = np.ix_(slots, slots if others is None else self._held.slots(others))
        return self._gram.all()[places].astype(np.float64, copy=False)

    def solve(
        self, ids: IntArray, start: Float64Array, ridge: float, tol: Tolerance
    ) -> tuple[Float64Array, Float64Array, float]:
        """As in :class:`Refit`, but always to :data:`EXACT`, which costs no more."""
        gram, atb = self.gram(ids), self._held.atb(ids)
        results = [nnls(gram, q, ridge=ridge, start=x, tol=EXACT) for q, x in zip(atb.T, start.T, strict=True)]
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


class NewtonRefit:
    """By projected Newton steps.

    exact: where columns are few enough for a Gram matrix. Then products with the Hessian come from one in float32, and
    `exact` finds the weights that the steps do not. Else products come from the columns.
    """

    def __init__(self, held: HeldColumns, targets: Float64Array, norms: Float64Array, exact: GramRefit | None) -> None:
        self._held, self._targets, self._norms, self._exact = held, targets, norms, exact
        self._gram = HeldGram(held, np.float32) if exact else None
        self._serials = _NO_IDS
        self._basis: FloatArray | None = None
        self._shadows: FloatArray = np.empty((0, 1))

    def solve(
        self, ids: IntArray, start: Float64Array, ridge: float, tol: Tolerance
    ) -> tuple[Float64Array, Float64Array, float]:
        """As in :class:`Refit`."""
        self._follow()
        lengths, slots = np.sqrt(self._norms[ids] ** 2 + ridge), self._held.slots(ids)
        gram = self._gram.all() if self._gram else None
        columns = Columns(self._held.rows(), slots, ridge, lengths, self._shadows[slots], gram)
        solved = [
            nnls_columns(columns, b, q, x, tol)
            for b, q, x in zip(self._targets.T, self._held.atb(ids).T, start.T, strict=True)
        ]
        x, kkt = np.stack([result.x for result, _ in solved], axis=1), max(result.kkt for result, _ in solved)
        if kkt <= _OPTIMAL or tol.gain:
            return x, np.stack([r for _, r in solved], axis=1), kkt
        if self._exact is None:
            logger.warning("the weights of %d atoms violate their optimality conditions by %.1e", len(ids), kkt)
            return x, np.stack([r for _, r in solved], axis=1), kkt
        logger.info("Newton steps leave a KKT violation of %.1e on %d atoms: solved by pivoting", kkt, len(ids))
        return self._exact.solve(ids, x, ridge, tol)

    def _follow(self) -> None:
        """The shadows of the columns that are held now; the basis is that of the first ones."""
        serials = self._held.serials
        new = _changed(self._serials, serials)
        self._serials = serials.copy()
        if not new.size:
            return
        rows = self._held.entries(new)
        if self._basis is None:
            self._basis = _strongest_directions(rows)
        known, self._shadows = self._shadows, np.empty((len(serials), self._basis.shape[1]), self._basis.dtype)
        self._shadows[: len(known)] = known[: len(serials)]
        self._shadows[new] = rows @ self._basis


def _changed(known: IntArray, serials: IntArray) -> IntArray:
    """The slots that hold another load of a column than when their serials were `known`."""
    changed = np.ones(len(serials), dtype=bool)
    changed[: len(known)] = serials[: len(known)] != known[: len(serials)]
    return np.flatnonzero(changed)


def _strongest_directions(rows: FloatArray) -> FloatArray:
    """An orthonormal basis [D, r] of the directions in which rows [n, D] are longest.

    By a randomised range finder with one power iteration (Halko, Martinsson, Tropp, "Finding structure with
    randomness", 2011), from a fixed seed: the basis decides how fast a refit is, not what it finds.
    """
    count = min(_DIRECTIONS, *rows.shape)
    start = np.random.default_rng(0).standard_normal((len(rows), count)).astype(rows.dtype)
    basis, _ = np.linalg.qr(rows.T @ start)
    basis, _ = np.linalg.qr(rows.T @ (rows @ basis))
    return basis


def _products(rows: FloatArray, others: FloatArray, dtype: type[np.floating[Any]]) -> FloatArray:
    """rows [m, D] times others [n, D]^T in `dtype`, converting a bounded number of entries at a time."""
    if rows.dtype == others.dtype == dtype:
        return rows @ others.T
    total = np.zeros((len(rows), len(others)), dtype)
    for piece in pieces(rows.shape[1], 8 * (len(rows) + len(others))):
        total += rows[:, piece].astype(dtype, copy=False) @ others[:, piece].astype(dtype, copy=False).T
    return total
