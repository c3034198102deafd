"""What the pursuits share: the estimator's face."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit.loop import Callback, Layer, Steps
from gradpursuit.pursuit.matrix import Float64Array, GradientMatrix, as_matrix, as_vector
from gradpursuit.pursuit.path import BudgetPath, Knee
from gradpursuit.pursuit.problem import PursuitProblem

logger = logging.getLogger("gradpursuit")


class PursuitRegressor(RegressorMixin, BaseEstimator):
    """The estimator face of the pursuits: parameter checks, fitted attributes, `predict`."""

    n_nonzero_coefs: int | None
    alpha: float
    tol: float | None
    path_: BudgetPath
    _tol_may_be_none = False

    def predict(self, X: Any) -> Float64Array:
        """X w: the gradient that the weighted selection has in X [D, N]. Returns float64 [D]."""
        check_is_fitted(self)
        matrix = as_matrix(X)
        self._match_pool(X, matrix)
        return matrix.combine(self.support_, self.coef_[self.support_])

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R² of `predict(X)` for y [D]; of several targets y [D, q], for their mean."""
        target = as_vector(y, as_matrix(X).shape[0], "the target")
        return float(super().score(X, target if target.ndim == 1 else target.mean(axis=1), sample_weight))

    def knee(self, rule: str = "gain") -> Knee:
        """A budget beyond which more atoms help little, by a rule of :meth:`BudgetPath.knee`."""
        check_is_fitted(self)
        return self.path_.knee(rule)

    def _numbers(self, X: Any, y: Any, *, same_pool: bool = False) -> tuple[GradientMatrix, Float64Array]:
        """X and y for a fit, checked; sets `n_features_in_` and, for a data frame, `feature_names_in_`.

        same_pool: whether X must have the columns that were fitted to before.
        """
        if y is None:
            raise PursuitError(
                f"{type(self).__name__} requires y to be passed, but the target y is None. Pass the target gradient "
                "[D]."
            )
        matrix = as_matrix(X)
        target = as_vector(y, matrix.shape[0], "the target")
        if same_pool:
            self._match_pool(X, matrix)
        else:
            self._check_names(X, reset=True)
        return matrix, target

    def _match_pool(self, X: Any, matrix: GradientMatrix) -> None:
        """Raise unless X has the columns that were fitted to: as many, with the same names."""
        n, N = matrix.shape[1], self.n_features_in_
        if n != N:
            raise PursuitError(
                f"X has {n} features, but {type(self).__name__} is expecting {N} features as input. Its {n} columns "
                f"must be the {N} examples of the pool that was fitted to; to add new ones there is "
                "GradientTrajectoryPursuit.extend."
            )
        self._check_names(X, reset=False)

    def _check_names(self, X: Any, *, reset: bool) -> None:
        """Remember (or compare with) the number and, for a data frame, the names of the columns; X is not touched."""
        try:
            validate_data(self, X, reset=reset, skip_check_array=True)
        except (TypeError, ValueError) as error:
            raise PursuitError(str(error)) from error

    def _budget(self, matrix: GradientMatrix) -> int:
        """Check the parameters common to all pursuits, before any work; the budget k."""
        require_number("alpha", self.alpha, 0.0, "0 is the plain gradient match, 0.3 the usual ridge")
        if self.tol is not None or not self._tol_may_be_none:
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
        self.support_, self.layers_ = whole.support, whole.layers
        self.coef_ = np.zeros(parts[0][0].matrix.shape[1])
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


class OneLayerPursuit(PursuitRegressor):
    """A pursuit of one target, or of the mean of several, in one layer."""

    def fit(self, X: Any, y: Any, callback: Callback | None = None) -> OneLayerPursuit:
        """Choose and weigh atoms of X ([D, N] array, tensor or `GradientMatrix`) for the target y [D].

        callback and errors as in :meth:`GradientTrajectoryPursuit.fit`; of several targets y [D, q] the mean is
        pursued.
        """
        matrix, target = self._numbers(X, y)
        budget = self._budget(matrix)
        problem = PursuitProblem(matrix, target if target.ndim == 1 else target.mean(axis=1), self.alpha, 1)
        layer = Layer(problem.empty(), [])
        try:
            self._pursue(problem, budget, layer, Steps(problem, callback))
        except KeyboardInterrupt:
            problem.held.release()  # it may have been interrupted half-way through a change
            logger.warning("interrupted: the pursuit ends with the best support so far")
        if len(layer.fit.ids):
            problem.held.load(layer.fit.ids)
            kkt = problem.gram.violation(layer.fit.ids, layer.fit.weights, problem.ridge)
            layer.fit = replace(layer.fit, kkt=kkt)
        self._publish([(problem, [layer])])
        return self

    @abstractmethod
    def _pursue(self, problem: PursuitProblem, budget: int, layer: Layer, steps: Steps) -> None:
        """Pursue; `layer` has the best fit at all times, and in the end why it ended."""


def require_number(name: str, value: Any, least: float, meaning: str) -> None:
    """Raise unless `value` is a finite real number >= `least`."""
    if not isinstance(value, Real) or isinstance(value, bool) or not least <= float(value) < np.inf:
        raise PursuitError(f"{name} is {value!r}; it must be a finite number >= {least:g}: {meaning}.")


def require_count(name: str, value: Any) -> None:
    """Raise unless `value` is an integer >= 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise PursuitError(f"{name} is {value!r}; it must be an integer >= 1.")
