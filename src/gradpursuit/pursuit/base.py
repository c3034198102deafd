"""What the pursuits share: the estimator's face."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit.loop import Layer
from gradpursuit.pursuit.matrix import Float64Array, GradientMatrix, as_matrix
from gradpursuit.pursuit.path import BudgetPath, Knee
from gradpursuit.pursuit.problem import PursuitProblem


class PursuitRegressor(RegressorMixin, BaseEstimator):
    """The estimator face of the pursuits: parameter checks, fitted attributes, `predict`."""

    n_nonzero_coefs: int | None
    alpha: float
    tol: float | None
    path_: BudgetPath

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

    def knee(self, rule: str = "gain") -> Knee:
        """A budget beyond which more atoms help little, by a rule of :meth:`BudgetPath.knee`."""
        check_is_fitted(self)
        return self.path_.knee(rule)

    def _budget(self, matrix: GradientMatrix) -> int:
        """Check the parameters common to all pursuits, before any work; the budget k."""
        require_number("alpha", self.alpha, 0.0, "0 is the plain gradient match, 0.3 the usual ridge")
        if self.tol is not None:
            require_number("tol", self.tol, 0.0, "it is the relative improvement below which the pursuit ends")
        N = matrix.shape[1]
        if self.n_nonzero_coefs is None:
            return max(1, N // 10)
        require_count("n_nonzero_coefs", self.n_nonzero_coefs)
        if self.n_nonzero_coefs > N:
            raise PursuitError(
                f"n_nonzero_coefs is {self.n_nonzero_coefs}, but the pool has only {N} examples. Ask for at most {N}."
            )
        return int(self.n_nonzero_coefs)

    def _publish(self, parts: list[tuple[PursuitProblem, list[Layer]]]) -> None:
        """Set the fitted attributes that all pursuits have, in the units of the target."""
        for problem, _ in parts:
            problem.held.release()
        self.path_ = BudgetPath(parts)
        whole = self.path_.whole()
        N = parts[0][0].matrix.shape[1]
        self.n_features_in_ = N
        self.support_, self.layers_ = whole.support, whole.layers
        self.coef_ = np.zeros(N)
        self.coef_[whole.support] = whole.weights
        layers = [layer for _, layers in parts for layer in layers]
        # A later layer that found no atom left is told by its stop reason; it has no steps.
        self.steps_ = [
            step
            for _, made in parts
            for layer in made
            if layer is made[0] or len(layer.fit.ids)
            for step in layer.steps
        ]
        first = parts[0][1][0].steps
        self.residual_path_ = np.array([step.relative_residual for step in first])
        self.objective_path_ = np.array([step.objective for step in first])
        self.kkt_ = max(layer.fit.kkt for layer in layers)
        self.n_iter_ = sum(layer.n_iter for layer in layers)
        self.stop_reason_ = [layer.stop_reason for layer in layers]


def require_number(name: str, value: Any, least: float, meaning: str) -> None:
    """Raise unless `value` is a finite real number >= `least`."""
    if not isinstance(value, Real) or isinstance(value, bool) or not least <= float(value) < np.inf:
        raise PursuitError(f"{name} is {value!r}; it must be a finite number >= {least:g}: {meaning}.")


def require_count(name: str, value: Any) -> None:
    """Raise unless `value` is an integer >= 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise PursuitError(f"{name} is {value!r}; it must be an integer >= 1.")
