"""Non-negative least squares on many long columns, without their Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradpursuit.pursuit.nnls import NNLSResult, violation
from gradpursuit.pursuit.rows import Float64Array, IntArray, Rows

BoolArray = NDArray[np.bool_]

_STEPS = 100  # Newton steps; five to fifteen are usual
_INNER = 200  # conjugate gradient steps for one direction
_FORCING = 0.1  # how much a direction must lower the gradient on the free variables


@dataclass(frozen=True)
class Columns:
    """The columns A_T of a problem: held rows, which of them, their ridge and their lengths √(‖a_i‖² + ridge)."""

    rows: Rows
    slots: IntArray
    ridge: float
    lengths: Float64Array

    def combine(self, x: Float64Array) -> Float64Array:
        """A x: float64 [D]; zeros cost nothing."""
        used = np.flatnonzero(x)
        return self.rows.combine(self.slots[used], x[used])

    def products(self, r: Float64Array, which: IntArray | None = None) -> Float64Array:
        """Aᵀ r for all columns or for those at places `which`: float64."""
        return self.rows.dots(r[None], self.slots if which is None else self.slots[which])[:, 0]


def nnls_columns(
    columns: Columns, target: Float64Array, atb: Float64Array, start: Float64Array, tol: float
) -> tuple[NNLSResult, Float64Array]:
    """Minimise ½‖A x − b‖² + ½ ridge‖x‖² over x ≥ 0 for b [D], with atb = Aᵀb [n].

    Returns the result, whose `kkt` is the violation defined in :func:`nnls` (and `n_iter` the products with A and Aᵀ),
    and the residual b − A x, float64 [D].

    Method: projected Newton steps (Bertsekas, "Projected Newton methods for optimization problems with simple
    constraints", 1982): on the variables that are positive or about to be, the Newton direction is found by
    conjugate gradients, to a tenth of the gradient; the step is projected onto x ≥ 0, and shortened on the segment
    to its exact minimum. Time: two products with the free columns for each inner step; memory: none of the order
    of n² or of a second copy of A.
    """
    x, scale = start.copy(), float((np.abs(atb) / columns.lengths).max(initial=0.0))
    r = target - columns.combine(x)
    products = 1
    best: tuple[float, Float64Array, Float64Array] = (np.inf, x, r)
    for _ in range(_STEPS):
        y = columns.ridge * x - columns.products(r)
        products += 1
        kkt = violation(y / columns.lengths, x, scale)
        if kkt < best[0]:
            best = (kkt, x, r)
        if kkt <= tol:
            break
        free = np.flatnonzero((x > 0) | (y < 0))
        direction, inner = _newton_direction(columns, free, y[free])
        x, r, moved = _projected_step(columns, target, x, r, y, free, direction)
        products += 2 * inner + moved
        if not moved:
            break
    kkt, x, r = best
    return NNLSResult(x, kkt, products), r


def _newton_direction(columns: Columns, free: IntArray, y: Float64Array) -> tuple[Float64Array, int]:
    """d with (A_FᵀA_F + ridge) d ≈ −y, by conjugate gradients scaled to unit columns; and the steps taken."""
    weights = 1.0 / columns.lengths[free] ** 2
    d, g = np.zeros(len(free)), -y
    z = weights * g
    p, rho = z.copy(), float(g @ z)
    goal = _FORCING**2 * rho
    for step in range(1, _INNER + 1):
        image = columns.rows.combine(columns.slots[free], p)
        curvature = float(image @ image) + columns.ridge * float(p @ p)
        if curvature <= 0:
            return d, step
        d += rho / curvature * p
        g -= rho / curvature * (columns.products(image, free) + columns.ridge * p)
        z = weights * g
        before, rho = rho, float(g @ z)
        if rho <= goal:
            return d, step
        p = z + rho / before * p
    return d, _INNER


def _projected_step(
    columns: Columns,
    target: Float64Array,
    x: Float64Array,
    r: Float64Array,
    y: Float64Array,
    free: IntArray,
    direction: Float64Array,
) -> tuple[Float64Array, Float64Array, int]:
    """The new x and residual, and how many products it took; 0: no step lowers the objective."""
    length = 1.0
    for tries in range(1, 31):
        there = x.copy()
        there[free] = np.maximum(x[free] + length * direction, 0.0)
        change = there - x
        slope = float(y @ change)
        if slope < 0:
            r_there = target - columns.combine(there)
            image = r - r_there
            curvature = float(image @ image) + columns.ridge * float(change @ change)
            share = -slope / curvature if curvature > 0 else 1.0
            if share >= 1:
                return there, r_there, tries
            if share > 0.5 or tries > 4:
                return x + share * change, r - share * image, tries
        length /= 2
    return x, r, 0
