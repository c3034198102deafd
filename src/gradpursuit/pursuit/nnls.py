"""Non-negative least squares on a Gram matrix, to a stated tolerance, also when the matrix is singular."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit.matrix import Float64Array

BoolArray = NDArray[np.bool_]

_PATIENCE = 3  # block exchanges without progress before the safe method takes over
_PASSES = 60  # proximal passes; one or two are usual


@dataclass(frozen=True)
class NNLSResult:
    """A solution of :func:`nnls`.

    Attributes:
        x: float64 [n], non-negative, with exact zeros.
        kkt: the violation of the optimality conditions at x, relative, as defined in :func:`nnls`.
        n_iter: linear systems solved.
    """

    x: Float64Array
    kkt: float
    n_iter: int


def nnls(
    gram: ArrayLike,
    atb: ArrayLike,
    *,
    ridge: float = 0.0,
    start: ArrayLike | None = None,
    tol: float = 1e-8,
    max_iter: int | None = None,
) -> NNLSResult:
    """Minimise ½ xᵀ(G + ridge·I)x − atbᵀx over x ≥ 0, where G = AᵀA and atb = Aᵀb.

    The violation of the Karush-Kuhn-Tucker conditions, with the gradient y = (G + ridge·I)x − atb and the
    lengths s_i = √(G_ii + ridge), is the largest of −y_i/s_i where x_i = 0 and |y_i|/s_i where x_i > 0,
    divided by the largest |atb_i|/s_i. It does not change when b, A or a single column of A (with ridge =
    0) is multiplied by a number. If `tol` cannot be reached the best x found is returned: look at `kkt`.

    Method: block principal pivoting (Portugal, Júdice, Vicente, "A comparison of block pivoting and
    interior-point algorithms for linear least squares problems with nonnegative variables", 1994) with
    Cholesky factors, and the active-set method of Lawson and Hanson (1974) should the blocks cycle. A
    singular G is met by proximal passes: each adds a tiny multiple of ½‖x − previous x‖², which makes the
    system positive definite and whose fixed point is the solution of the problem itself.

    Args:
        gram: [n, n], symmetric positive semi-definite; it may be singular (repeated columns, n > D).
        atb: [n].
        ridge: ≥ 0, in the units of `gram`.
        start: [n] or None; entries > 0 say which weights are expected to be positive.
        tol: the violation to reach.
        max_iter: most linear systems to solve; default 100 + 5n.

    Raises:
        PursuitError: shapes do not fit, values are not finite real numbers, `gram` is not symmetric, the ridge is
            negative, or `tol` or `max_iter` is no positive number.
    """
    G, q, x = _checked(gram, atb, ridge, start)
    if not (isinstance(tol, (int, float)) and tol > 0 and (max_iter is None or max_iter >= 1)):
        raise PursuitError(f"tol is {tol} and max_iter is {max_iter}; both must be positive (max_iter may be None).")
    if len(q) == 0 or q.max() <= 0:  # then x = 0 is the solution
        return NNLSResult(np.zeros(len(q)), 0.0, 0)
    lengths = _lengths(G, q, ridge)
    # Unit columns: rounding is then the same for all, and so are the tolerances.
    H = G / np.outer(lengths, lengths)
    H.flat[:: len(q) + 1] += ridge / lengths**2
    solver = _Pivoting(H, q / lengths, tol, max_iter or 100 + 5 * len(q))
    best, x = np.zeros(len(q)), x * lengths
    kkt = solver.violation(best)
    for _ in range(_PASSES):
        x = solver.solve_near(x)
        found = solver.violation(x)
        if found < kkt:
            best, kkt = x, found
        if kkt <= tol or solver.solved >= solver.max_iter:
            break
    return NNLSResult(best / lengths, kkt, solver.solved)


def kkt_violation(gram: Float64Array, atb: Float64Array, x: Float64Array, ridge: float = 0.0) -> float:
    """The violation of the optimality conditions at x [n] >= 0, as defined in :func:`nnls`."""
    lengths = _lengths(gram, atb, ridge)
    y = (gram @ x + ridge * x - atb) / lengths
    return violation(y, x, float(np.abs(atb / lengths).max(initial=0.0)))


def violation(y: Float64Array, x: Float64Array, scale: float) -> float:
    """The violation at x >= 0, from the gradient y / s and the largest |atb| / s, as defined in :func:`nnls`."""
    worst = float(np.where(x > 0, np.abs(y), np.maximum(-y, 0.0)).max(initial=0.0))
    return worst / scale if worst else 0.0


def _checked(
    gram: ArrayLike, atb: ArrayLike, ridge: float, start: ArrayLike | None
) -> tuple[Float64Array, Float64Array, Float64Array]:
    G, q = _real("gram", gram), _real("atb", atb)
    x = np.zeros(q.shape) if start is None else np.maximum(_real("start", start), 0.0)
    if q.ndim != 1 or G.shape != (len(q), len(q)) or x.shape != q.shape:
        raise PursuitError(
            f"gram {G.shape}, atb {q.shape} and start {x.shape} do not fit; n columns need gram [n, n] and vectors [n]."
        )
    if not (np.isfinite(G).all() and np.isfinite(q).all() and np.isfinite(x).all()):
        raise PursuitError("gram, atb or start holds NaN or infinity; least squares needs finite numbers.")
    if not (isinstance(ridge, (int, float, np.number)) and np.isfinite(ridge) and ridge >= 0):
        raise PursuitError(f"ridge is {ridge!r}; it must be a finite number >= 0.")
    uneven = np.abs(G - G.T)
    if uneven.max(initial=0.0) > 1e-6 * np.abs(G).max(initial=0.0):
        i, j = divmod(int(uneven.argmax()), len(q))
        raise PursuitError(f"gram[{i}, {j}] is {G[i, j]} but gram[{j}, {i}] is {G[j, i]}; pass gram = A.T @ A.")
    return G, q, x


def _real(name: str, values: ArrayLike) -> Float64Array:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise PursuitError(f"{name} holds {array.dtype} values; least squares needs real numbers.")
    return array.astype(np.float64, copy=False)


def _lengths(G: Float64Array, q: Float64Array, ridge: float) -> Float64Array:
    squares = np.diagonal(G) + ridge
    impossible = (squares < 0) | ((squares == 0) & (q > 0))
    if impossible.any():
        i = int(np.argmax(impossible))
        raise PursuitError(
            f"gram[{i}, {i}] is {G[i, i]} and atb[{i}] is {q[i]}: no matrix A has such products, and the problem has "
            "no solution. Pass gram = A.T @ A and atb = A.T @ b of the same A."
        )
    return np.sqrt(np.where(squares > 0, squares, 1.0))


class _Pivoting:
    """Solves min ½xᵀHx − qᵀx + ½ shift‖x − anchor‖² over x ≥ 0, where H has a unit diagonal."""

    def __init__(self, H: Float64Array, q: Float64Array, tol: float, max_iter: int) -> None:
        self.H, self.q, self.max_iter = H, q, max_iter
        self.scale = float(np.abs(q).max())
        # The smallest shift that keeps Cholesky safe: rounding in the factor is of this order.
        self.shift = 1e-13 * len(q)
        # Stricter than `tol`: signs are decided here, and rounding to zero must not spoil the result.
        self.slack = 1e-2 * tol * self.scale
        self.x_slack = 1e-2 * self.slack / len(q)
        self.solved = 0
        self._factored: BoolArray | None = None
        self._factor: tuple[Float64Array, bool] | None = None

    def gradient(self, x: Float64Array) -> Float64Array:
        return self.H @ x - self.q

    def violation(self, x: Float64Array) -> float:
        return violation(self.gradient(x), x, self.scale)

    def solve_near(self, anchor: Float64Array) -> Float64Array:
        """One proximal pass; a larger shift if rounding left the matrix indefinite."""
        while True:
            try:
                q = self.q + self.shift * anchor
                x, done = self._exchange_blocks(q, anchor > 0)
                return x if done else self._active_set(q, x)
            except LinAlgError:
                self.shift = 10 * self.shift
                self._factored = None

    def _exchange_blocks(self, q: Float64Array, passive: BoolArray) -> tuple[Float64Array, bool]:
        """Swap all infeasible variables at once while their number falls."""
        fewest, patience = len(q) + 1, _PATIENCE
        while True:
            x = self._solve(q, passive)
            y = self.gradient(x) + self.shift * x - (q - self.q)
            wrong = np.where(passive, x < -self.x_slack, y < -self.slack)
            count = int(np.count_nonzero(wrong))
            if count == 0 or self.solved >= self.max_iter:
                return np.maximum(x, 0.0), True
            if count < fewest:
                fewest, patience = count, _PATIENCE
            elif patience > 0:
                patience -= 1
            else:
                return np.maximum(x, 0.0), False
            passive = passive ^ wrong

    def _active_set(self, q: Float64Array, x: Float64Array) -> Float64Array:
        """Lawson-Hanson: one variable enters at a time and the objective falls, so it cannot cycle."""
        passive = x > 0
        while self.solved < self.max_iter:
            x = self._descend(q, x, passive)
            passive = x > 0
            y = np.where(passive, np.inf, self.gradient(x) + self.shift * x - (q - self.q))
            entering = int(np.argmin(y))
            if y[entering] >= -self.slack:
                break
            passive[entering] = True
        return x

    def _descend(self, q: Float64Array, x: Float64Array, passive: BoolArray) -> Float64Array:
        """Go towards the solution on `passive`, dropping variables at the boundary, until it is feasible."""
        passive = passive.copy()
        while True:
            z = self._solve(q, passive)
            blocked = passive & (z <= 0)
            if not blocked.any():
                return z
            step = np.min(x[blocked] / (x[blocked] - z[blocked]), initial=1.0)
            x = np.maximum(x + step * (z - x), 0.0)
            out = blocked & (x <= self.x_slack)
            passive &= ~(out if out.any() else blocked)
            x[~passive] = 0.0

    def _solve(self, q: Float64Array, passive: BoolArray) -> Float64Array:
        """The unconstrained minimiser over the variables in `passive`, zero elsewhere."""
        self.solved += 1
        x = np.zeros(len(q))
        index = np.flatnonzero(passive)
        if index.size:
            if self._factored is None or not np.array_equal(passive, self._factored):
                system = self.H[np.ix_(index, index)]
                system.flat[:: len(index) + 1] += self.shift
                self._factor = cho_factor(system, lower=True, overwrite_a=True, check_finite=False)
                self._factored = passive.copy()
            x[index] = cho_solve(self._factor, q[index], check_finite=False)
        return x
