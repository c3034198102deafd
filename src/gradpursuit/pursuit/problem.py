"""The problem that all pursuits solve: checked numbers, and the best weights of a support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit.candidates import CandidatePool
from gradpursuit.pursuit.held import HeldColumns
from gradpursuit.pursuit.matrix import Float64Array, GradientMatrix, IntArray, as_vector
from gradpursuit.pursuit.newton import Tolerance
from gradpursuit.pursuit.ranking import RankedMatrix, RankedScores, Ranking, scores_of
from gradpursuit.pursuit.refit import GramRefit, NewtonRefit, Refit

# A residual below this share of the target is rounding, not signal: features are stored in float32 at best.
MATCHED = 1e-6
# A cosine with the residual below this is rounding in a float32 pass.
_LEAST_COSINE = 1e-6
# A share of the fit below this is a zero that rounding kept positive.
_LEAST_CONTRIBUTION = 1e-9
# How many atoms join at a time, as a share of the budget: more cost more than they gain (benchmarks/pursuit.py).
JOIN = 0.25
# Up to this many columns are held, a refit is exact, by a Gram matrix in double precision and its factors.
GRAM_COLUMNS = 250
# Up to this many, Newton steps have a Gram matrix in single precision. To form it for those that join costs as many
# multiplications for each column held as they are; without it each of some hundred products reads all entries twice.
# A processor multiplies about ten times as fast as it reads from memory: it pays until a thousand or two join.
NEWTON_GRAM_COLUMNS = 6000


@dataclass(frozen=True)
class SupportFit:
    """The best weights on a set of atoms, for q targets of unit length.

    ids [m], weights [m, q] >= 0 (each atom has a positive one), residuals b - A x [D, q], objective: the mean over
    targets of ½‖residual‖² + ½λ‖x‖², and the largest KKT violation.
    """

    ids: IntArray
    weights: Float64Array
    residual: Float64Array
    objective: float
    kkt: float

    @property
    def relative_residual(self) -> float:
        """‖b - A x‖ / ‖b‖; of several targets the root of the mean square."""
        return float(np.linalg.norm(self.residual) / np.sqrt(self.residual.shape[1]))

    def improves(self, other: SupportFit, tol: float) -> bool:
        """Whether the objective is below that of `other` by more than a share `tol`.

        The share is of what is left of the objective or of what has been gained since w = 0, whichever is less:
        near an exact match the first is small, under a large ridge the second.
        """
        gain = other.objective - self.objective
        return gain > tol * min(other.objective, 0.5 - self.objective) and gain > 0


@dataclass(frozen=True)
class Pace:
    """How a pursuit goes on.

    fewer: how many times fewer atoms join after a merge that did not help; tol: the improvement below which it is not
    worth going on, unless the user says. Where refits cost little, both are finer.
    """

    fewer: int
    tol: float


class PursuitProblem:
    """min ½‖A w − b‖² + ½ λ‖w‖² over w ≥ 0, with b scaled to unit length (scaling b scales w, nothing else).

    λ = `alpha` times the mean squared norm of the atoms. y is [D], or [D, q] for q targets that share a support.
    room: how many atoms will be chosen; half as many again are held at a time, or more where many are copies.
    """

    def __init__(self, matrix: GradientMatrix, y: Any, alpha: float, room: int) -> None:
        self.matrix = matrix
        squared_norms = matrix.squared_norms()
        self.norms = np.sqrt(squared_norms)
        self.ridge = alpha * float(squared_norms.mean())
        self.targets, self.target_norms = _unit_targets(y, matrix.shape[0])
        # Of the objective: with several targets it is relative to each.
        self.unit = float(self.target_norms[0] ** 2) if len(self.target_norms) == 1 else 1.0
        self.held = HeldColumns(matrix, self.targets, self.norms, room + room // 2)
        self._passes = 1  # for the norms
        self.gram = GramRefit(self.held, self.targets)
        self.refit: Refit = self.gram
        self.pace = Pace(fewer=4, tol=1e-4)
        columns = (1 + JOIN) * room
        if columns > GRAM_COLUMNS:
            exact = self.gram if columns <= NEWTON_GRAM_COLUMNS else None
            self.refit = NewtonRefit(self.held, self.targets, self.norms, exact)
            self.pace = Pace(fewer=8, tol=1e-3)

    def pool(self, max_coherence: float | None) -> CandidatePool:
        """All atoms, to draw candidates from."""
        return CandidatePool(self.held, self.norms, max_coherence)

    def empty(self) -> SupportFit:
        """w = 0."""
        nothing = np.empty((0, self.targets.shape[1]))
        return SupportFit(np.empty(0, dtype=np.int64), nothing, self.targets, 0.5, 0.0)

    @property
    def bytes_read(self) -> int:
        """Bytes of the matrix read so far, by passes and for columns."""
        return self._passes * self.matrix.nbytes + self.held.fetched_bytes

    def scores(self, fit: SupportFit) -> Float64Array:
        """How much each atom would lower the objective: ‖(Aᵀr)₊‖ over the targets, [N]; one pass."""
        self._passes += 1
        return scores_of(self.matrix.correlate(self._residuals(fit)))

    def ranking(self, fit: SupportFit) -> Ranking:
        """The atoms by falling :meth:`scores`, without those that do not count; one pass."""
        least = _LEAST_COSINE * fit.relative_residual
        if not isinstance(self.matrix, RankedMatrix):
            return RankedScores(self.scores(fit), self.norms, least)
        self._passes += 1
        return self.matrix.ranking(self._residuals(fit), least)

    def _residuals(self, fit: SupportFit) -> Float64Array:
        """[D] of one target, [D, q] of several."""
        return fit.residual[:, 0] if len(self.target_norms) == 1 else fit.residual

    def least_score(self, fit: SupportFit) -> Float64Array:
        """The score [N] for the residual of `fit` that is too small to count as positive; a zero atom's never is."""
        return np.where(self.norms > 0, _LEAST_COSINE * fit.relative_residual * self.norms, np.inf)

    def contributions(self, ids: IntArray, weights: Float64Array) -> Float64Array:
        """‖x_i‖‖a_i‖ of atoms `ids` [m] with weights [m, q]: float64 [m]."""
        return np.sqrt((weights**2).sum(axis=1)) * self.norms[ids]

    def fit(self, ids: IntArray, start: Float64Array, count: int | None, tol: Tolerance) -> SupportFit:
        """Non-negative least squares on held `ids` [m], warm-started; then pruned to `count` and refitted.

        Pruning keeps the largest contributions; equal ones by id. The result holds only atoms with a positive weight,
        ordered by contribution, then by id.
        """
        x, r, kkt = self.refit.solve(ids, start, self.ridge, tol)
        ranked = self.ranked(ids, x)
        if count is not None and len(ranked) > count:
            ids, x = ids[ranked[:count]], x[ranked[:count]]
            x, r, kkt = self.refit.solve(ids, x, self.ridge, tol)
            ranked = self.ranked(ids, x)
        return self.evaluated(ids[ranked], x[ranked], r, kkt)  # what is left out is nothing but rounding

    def evaluated(self, ids: IntArray, x: Float64Array, r: Float64Array, kkt: float) -> SupportFit:
        """A fit of given weights and residuals, with its objective."""
        objective = 0.5 * (float((r**2).sum()) + self.ridge * float((x**2).sum())) / r.shape[1]
        return SupportFit(ids, x, r, objective, kkt)

    def ranked(self, ids: IntArray, x: Float64Array) -> NDArray[np.int64]:
        """Places of the atoms that contribute more than rounding, by falling contribution, equal ones by id."""
        contributions = self.contributions(ids, x)
        order = np.lexsort((ids, -contributions))
        return order[contributions[order] > _LEAST_CONTRIBUTION * contributions.max(initial=0.0)]


def require_nonzero(b: Float64Array) -> None:
    """Raise :class:`PursuitError` if one of the targets b [D, q] is zero."""
    zero = np.flatnonzero(~b.any(axis=0))
    if zero.size:
        which = "the target gradient" if b.shape[1] == 1 else f"the gradient of target group {zero[0]}"
        raise PursuitError(
            f"{which} is zero, so every example matches it with weight zero. Check the target rows: "
            "are their labels all masked, or do their gradients cancel?"
        )


def _unit_targets(y: Any, D: int) -> tuple[Float64Array, Float64Array]:
    """The targets scaled to unit length [D, q], and their lengths [q]."""
    b = as_vector(y, D, "the target")
    b = b[:, None] if b.ndim == 1 else b
    # Dividing by the largest entry first keeps the squares of very small or large targets in range.
    largest = np.abs(b).max(axis=0)
    require_nonzero(b)
    lengths = largest * np.linalg.norm(b / largest, axis=0)
    return b / lengths, lengths
