"""What the pursuits share: the checked problem, the fit of one support, and the estimator's face."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit.candidates import CandidateCache, CandidatePool
from gradpursuit.pursuit.matrix import Float64Array, GradientMatrix, IntArray, as_matrix, as_vector
from gradpursuit.pursuit.nnls import kkt_violation, nnls

logger = logging.getLogger("gradpursuit")

# A residual below this share of the target is rounding, not signal: features are stored in float32 at best.
MATCHED = 1e-6
# A cosine with the residual below this is rounding in a float32 pass.
_LEAST_COSINE = 1e-6
_NNLS_TOL = 1e-10
# A share of the fit below this is a zero that rounding kept positive.
_LEAST_CONTRIBUTION = 1e-9


class PathRecord(NamedTuple):
    """The state of a pursuit after an accepted iteration (iteration 0 is w = 0)."""

    layer: int
    iteration: int
    support_size: int
    relative_residual: float
    objective: float


@dataclass(frozen=True)
class SupportFit:
    """The best weights on a set of atoms, for a target of unit length.

    ids [m], weights x [m] > 0, residual b - A x [D], objective ½‖residual‖² + ½λ‖x‖², and the KKT
    violation of x.
    """

    ids: IntArray
    weights: Float64Array
    residual: Float64Array
    objective: float
    kkt: float

    @property
    def relative_residual(self) -> float:
        """‖b - A x‖ / ‖b‖."""
        return float(np.linalg.norm(self.residual))

    def improves(self, other: SupportFit, tol: float) -> bool:
        """Whether the objective is below that of `other` by more than a share `tol`.

        The share is of what is left of the objective or of what has been gained since w = 0, whichever is less:
        near an exact match the first is small, under a large ridge the second.
        """
        gain = other.objective - self.objective
        return gain > tol * min(other.objective, 0.5 - self.objective) and gain > 0


@dataclass
class Layer:
    """One pursuit of the target: its last fit, the fits before it as records, and why it ended."""

    fit: SupportFit
    path: list[PathRecord]
    n_iter: int
    stop_reason: str


class PursuitProblem:
    """min ½‖A w − b‖² + ½ λ‖w‖² over w ≥ 0, with b scaled to unit length (scaling b scales w, nothing else).

    λ = `alpha` times the mean squared norm of the atoms.
    """

    def __init__(self, matrix: GradientMatrix, y: Any, alpha: float) -> None:
        self.matrix = matrix
        squared_norms = matrix.squared_norms()
        self.norms = np.sqrt(squared_norms)
        self.ridge = alpha * float(squared_norms.mean())
        b = as_vector(y, matrix.shape[0], "the target")
        # Dividing by the largest entry first keeps the squares of very small or large targets in range.
        largest = float(np.abs(b).max())
        if largest == 0:
            raise PursuitError(
                "the target gradient is zero, so every example matches it with weight zero. Check the target rows: "
                "are their labels all masked, or do their gradients cancel?"
            )
        self.target_norm = largest * float(np.linalg.norm(b / largest))
        self.target = b / self.target_norm
        self.cache = CandidateCache(matrix, self.target)

    def pool(self, max_coherence: float | None) -> CandidatePool:
        """All atoms, to draw candidates from."""
        return CandidatePool(self.cache, self.norms, max_coherence)

    def empty(self) -> SupportFit:
        """w = 0."""
        return SupportFit(np.empty(0, dtype=np.int64), np.empty(0), self.target, 0.5, 0.0)

    def least_score(self, fit: SupportFit) -> Float64Array:
        """The correlation [N] with the residual of `fit` that is too small to count as positive."""
        return _LEAST_COSINE * fit.relative_residual * self.norms

    def fit(self, ids: IntArray, start: Float64Array, count: int | None = None) -> SupportFit:
        """Non-negative least squares on `ids` [m], warm-started; then pruned to `count` and refitted.

        Pruning keeps the largest contributions x_i ‖a_i‖; equal ones by id. The result holds only
        positive weights, ordered by contribution, then by id.
        """
        x, _ = self.solve(ids, start)
        while True:
            order = np.lexsort((ids, -x * self.norms[ids]))
            order = order[self.counts(ids, x)[order]][:count]
            ids = ids[order]
            x, kkt = self.solve(ids, x[order])
            if self.counts(ids, x).all():
                break
        order = np.lexsort((ids, -x * self.norms[ids]))
        return self.evaluate(ids[order], x[order], kkt)

    def counts(self, ids: IntArray, x: Float64Array) -> NDArray[np.bool_]:
        """Which weights x [m] contribute more than rounding: bool [m]."""
        contribution = x * self.norms[ids]
        return contribution > _LEAST_CONTRIBUTION * contribution.max(initial=0.0)

    def violation(self, ids: IntArray, x: Float64Array) -> float:
        """The KKT violation of weights x [m] on held atoms `ids` [m]."""
        return kkt_violation(self.cache.gram(ids), self.cache.atb(ids), x, self.ridge)

    def evaluate(self, ids: IntArray, x: Float64Array, kkt: float) -> SupportFit:
        """The residual and the objective of given weights."""
        r = self.cache.residual(ids, x)
        return SupportFit(ids, x, r, 0.5 * float(r @ r) + 0.5 * self.ridge * float(x @ x), kkt)

    def solve(self, ids: IntArray, start: Float64Array) -> tuple[Float64Array, float]:
        """The non-negative weights on held atoms `ids` [m], with zeros, and their KKT violation."""
        result = nnls(self.cache.gram(ids), self.cache.atb(ids), ridge=self.ridge, start=start, tol=_NNLS_TOL)
        return result.x, result.kkt


class PursuitRegressor(RegressorMixin, BaseEstimator):
    """The estimator face of the pursuits: parameter checks, fitted attributes, `predict`."""

    n_nonzero_coefs: int
    alpha: float
    tol: float

    def predict(self, X: Any) -> Float64Array:
        """X w: the gradient that the weighted selection has in X [D, N]. Returns float64 [D]."""
        check_is_fitted(self)
        matrix = as_matrix(X)
        if matrix.shape[1] != self.n_features_in_:
            raise PursuitError(
                f"X has {matrix.shape[1]} columns, but the weights belong to {self.n_features_in_} pool examples. Pass "
                "the features of the same pool."
            )
        return matrix.combine(self.support_, self.coef_[self.support_])

    def _problem(self, X: Any, y: Any) -> PursuitProblem:
        """Check the parameters common to all pursuits and the numbers, before any work."""
        require_number("alpha", self.alpha, 0.0, "0 is the plain gradient match, 0.3 the usual ridge")
        require_number("tol", self.tol, 0.0, "it is the relative improvement below which the pursuit ends")
        require_count("n_nonzero_coefs", self.n_nonzero_coefs)
        matrix = as_matrix(X)
        N = matrix.shape[1]
        if self.n_nonzero_coefs > N:
            raise PursuitError(
                f"n_nonzero_coefs is {self.n_nonzero_coefs}, but the pool has only {N} examples. Ask for at most {N}."
            )
        self.n_features_in_ = N
        return PursuitProblem(matrix, y, self.alpha)

    def _publish(
        self, problem: PursuitProblem, layers: list[Layer], stop_reasons: list[str], copies: dict[int, int]
    ) -> None:
        """Set the fitted attributes, in the units of the target."""
        fits = [layer.fit for layer in layers]
        sizes = [len(fit.ids) for fit in fits]
        self.support_ = np.concatenate([fit.ids for fit in fits])
        self.layers_ = np.repeat(np.arange(1, len(fits) + 1), sizes)
        self.coef_ = np.zeros(problem.matrix.shape[1])
        self.coef_[self.support_] = np.concatenate([fit.weights for fit in fits]) * problem.target_norm
        unit = problem.target_norm**2
        # A later layer that found no atom left is told by its stop reason; it has no path.
        walked = [layer for layer in layers if layer is layers[0] or len(layer.fit.ids)]
        self.path_ = [record._replace(objective=record.objective * unit) for layer in walked for record in layer.path]
        first = [record for record in self.path_ if record.layer == 1]
        self.residual_path_ = np.array([record.relative_residual for record in first])
        self.objective_path_ = np.array([record.objective for record in first])
        self.kkt_ = max(fit.kkt for fit in fits)
        self.n_iter_ = sum(layer.n_iter for layer in layers)
        self.stop_reason_ = stop_reasons
        self.copies_ = copies


def record(layer: int, iteration: int, fit: SupportFit) -> PathRecord:
    """The record of a fit, logged at INFO."""
    made = PathRecord(layer, iteration, len(fit.ids), fit.relative_residual, fit.objective)
    logger.info(
        "pursuit layer %d iteration %d: %d atoms, relative residual %.6f, relative objective %.6g",
        *made[:4],
        2 * made.objective,
        extra={"progress": True},
    )
    return made


def require_number(name: str, value: Any, least: float, meaning: str) -> None:
    """Raise unless `value` is a finite real number >= `least`."""
    if not isinstance(value, Real) or isinstance(value, bool) or not least <= float(value) < np.inf:
        raise PursuitError(f"{name} is {value!r}; it must be a finite number >= {least:g}: {meaning}.")


def require_count(name: str, value: Any) -> None:
    """Raise unless `value` is an integer >= 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise PursuitError(f"{name} is {value!r}; it must be an integer >= 1.")
