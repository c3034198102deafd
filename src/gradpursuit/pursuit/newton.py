"""Non-negative least squares on many long columns, without their Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradpursuit.pursuit.nnls import NNLSResult, violation
from gradpursuit.pursuit.rows import Float64Array, FloatArray, IntArray, Rows

_STEPS = 300  # Newton steps; five to fifteen are usual
_INNER = 200  # conjugate gradient steps for one direction
_FACES = 30  # faces tried for one step
_FORCING = 0.1  # how much a direction must lower the gradient on the free variables


@dataclass(frozen=True)
class Tolerance:
    """When a refit is good enough.

    least: the KKT violation to reach; gain: end before that with a step that gains no more than this share of what all
    steps gained.
    """

    least: float
    gain: float = 0.0


@dataclass(frozen=True)
class Columns:
    """The columns A [D, n] of a problem.

    rows: held columns, as rows; slots [n]: which of them; ridge; lengths [n]: √(‖a_i‖² + ridge); shadows [n, r]: the
    columns in an orthonormal basis of the directions in which they are longest, for the preconditioner. gram: products
    of all held columns with one another, float32 is enough, or None: then products are formed from the columns.
    """

    rows: Rows
    slots: IntArray
    ridge: float
    lengths: Float64Array
    shadows: FloatArray
    gram: FloatArray | None = None

    def gradient(self, target: Float64Array, x: Float64Array) -> tuple[Float64Array, Float64Array]:
        """y = Aᵀ(A x − b) + ridge x and the residual b − A x, from the columns; weights of zero cost nothing."""
        used = np.flatnonzero(x)
        r = target - self.rows.combine(self.slots[used], x[used])
        return self.ridge * x - self.rows.dots(r[None], self.slots)[:, 0], r

    def curved(self, p: Float64Array, places: IntArray) -> Float64Array:
        """H p for H = AᵀA + ridge on the columns at `places` [m] alone: float64 [m]."""
        slots = self.slots[places]
        if self.gram is None:
            return self.rows.dots(self.rows.combine(slots, p)[None], slots)[:, 0] + self.ridge * p
        spread = np.zeros(len(self.gram), dtype=self.gram.dtype)
        spread[slots] = p
        return (self.gram @ spread)[slots] + self.ridge * p


def nnls_columns(
    columns: Columns, target: Float64Array, atb: Float64Array, start: Float64Array, tol: Tolerance
) -> tuple[NNLSResult, Float64Array]:
    """Minimise ½‖A x − b‖² + ½ ridge‖x‖² over x ≥ 0 for b [D], with atb = Aᵀb [n].

    Returns the result, whose `kkt` is the violation defined in :func:`nnls` (and `n_iter` the products with H), and the
    residual b − A x, float64 [D].

    Method: projected Newton steps (Bertsekas, "Projected Newton methods for optimization problems with simple
    constraints", 1982): on the variables that are positive or about to be, the Newton direction is found by
    conjugate gradients, to a tenth of the gradient, with a low-rank preconditioner (Frangella, Tropp, Udell,
    "Randomized Nyström preconditioning", 2021: gradients share few strong directions, which alone would take most
    steps); the step is projected onto x ≥ 0, and shortened on the segment to its exact minimum. Products with H may be
    those of single precision: the gradient is carried along, and computed anew from the columns before it is believed.
    """
    x, scale = start.copy(), float((np.abs(atb) / columns.lengths).max(initial=0.0))
    y, r = columns.gradient(target, x)
    products, gained = 1, 0.0
    fresh, ended, gain = True, False, 0.0
    for _ in range(_STEPS):
        kkt = violation(y / columns.lengths, x, scale)
        if kkt <= tol.least or ended:
            if fresh:
                break
            y, r = columns.gradient(target, x)
            products, fresh = products + 1, True
            continue
        free = np.flatnonzero((x > 0) | (y < 0))
        moved = None
        for there, inner in _newton_points(columns, x, y, free):
            products += inner
            moved = _step(columns, x, y, there)
            if moved:
                x, curved, gain = moved
                y, gained, products, fresh = y + curved, gained + gain, products + 1, False
                break
        ended = moved is None or gain <= tol.gain * gained
    if not fresh:
        y, r = columns.gradient(target, x)
        kkt = violation(y / columns.lengths, x, scale)
    return NNLSResult(x, kkt, products), r


class _Preconditioner:
    """(S Sᵀ + diag(rest))⁻¹ for the free columns' shadows S [m, r]; rest: what the shadows leave of H's diagonal."""

    def __init__(self, columns: Columns, free: IntArray) -> None:
        self._shadows = columns.shadows[free].astype(np.float64)
        squares = columns.lengths[free] ** 2
        # Shadows are in the precision of the data, so what they leave may be rounding.
        rest = np.maximum(squares - np.einsum("ij,ij->i", self._shadows, self._shadows), 1e-6 * squares)
        self._inverse = 1.0 / rest
        small = self._shadows.T @ (self._inverse[:, None] * self._shadows)
        small.flat[:: len(small) + 1] += 1.0
        self._small = np.linalg.inv(small)  # by one BLAS: SciPy's brings threads of its own, which wait for these

    def __call__(self, g: Float64Array) -> Float64Array:
        scaled = self._inverse * g
        return scaled - self._inverse * (self._shadows @ (self._small @ (scaled @ self._shadows)))


def _newton_points(
    columns: Columns, x: Float64Array, y: Float64Array, free: IntArray
) -> Iterator[tuple[Float64Array, int]]:
    """Points to go towards, the best first, and the products that each took.

    First where the objective is least if only the variables `free` change, about: those that the minimum has below zero
    are put there, and the rest is solved again, until none is. Should the objective not fall on the way to it: as far
    as the first variable meets zero on the way to the first minimum, on which it always falls.
    """
    there, every = x.copy(), np.arange(len(x))
    first, g, goal = x, -y[free], 0.0
    products = 0
    for face in range(_FACES):
        d, g, goal, inner = _conjugate_gradients(columns, free, g, goal)
        products += inner
        there[free] += d
        if not face:
            first = there - x
        below = there[free] < 0
        if not below.any():
            break
        back = np.zeros(len(x))
        back[free[below]] = there[free[below]]
        there -= back
        free = free[~below]
        g = g[~below] + columns.curved(back, every)[free]
        products += 1
    yield np.maximum(there, 0.0), products
    first[(x == 0) & (first < 0)] = 0.0
    lengths = np.divide(x, -first, out=np.ones(len(x)), where=first < 0)  # of the way to zero
    share = lengths.min(initial=1.0)
    yield np.where((first < 0) & (lengths == share), 0.0, np.maximum(x + share * first, 0.0)), 0


def _conjugate_gradients(
    columns: Columns, free: IntArray, g: Float64Array, goal: float
) -> tuple[Float64Array, Float64Array, float, int]:
    """d with (A_FᵀA_F + ridge) d ≈ g, what is left of g, the goal, and the steps taken."""
    precondition = _Preconditioner(columns, free)
    d, g = np.zeros(len(free)), g.copy()
    z = precondition(g)
    p, rho = z.copy(), float(g @ z)
    goal = goal or _FORCING**2 * rho
    for step in range(_INNER):
        if rho <= goal:
            return d, g, goal, step
        image = columns.curved(p, free)
        curvature = float(p @ image)
        if curvature <= 0:
            return d, g, goal, step + 1
        d += rho / curvature * p
        g -= rho / curvature * image
        z = precondition(g)
        before, rho = rho, float(g @ z)
        p = z + rho / before * p
    return d, g, goal, _INNER


def _step(
    columns: Columns, x: Float64Array, y: Float64Array, there: Float64Array
) -> tuple[Float64Array, Float64Array, float] | None:
    """The best x on the way there, how the gradient changes, and what is gained; None: nothing is."""
    change = there - x
    slope = float(y @ change)
    if slope >= 0:
        return None
    curved = columns.curved(change, np.arange(len(x)))
    curvature = float(change @ curved)
    share = min(-slope / curvature, 1.0) if curvature > 0 else 1.0
    there = there if share == 1 else x + share * change
    return there, share * curved, -share * (slope + 0.5 * share * curvature)
