"""Plain matching pursuit, without refits: the cheapest of its kind, for comparison."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradpursuit.pursuit.base import OneLayerPursuit, require_count
from gradpursuit.pursuit.loop import Callback, Layer, Steps
from gradpursuit.pursuit.problem import MATCHED, PursuitProblem


class MatchingPursuit(OneLayerPursuit):
    """Lower ½‖A w − b‖² + ½ λ‖w‖² over w ≥ 0 one weight at a time, with at most k non-zero ones.

    Each iteration takes the atom whose weight alone, raised as far as is best, lowers the objective most (ties by id),
    and raises it; weights given before are not fitted again. One pass for each iteration; an atom may come up again.

    Parameters
    ----------
    n_nonzero_coefs : int or None
        The budget k, 1 ≤ k ≤ N. None: a tenth of N.
    alpha : float
        Ridge, relative: λ = alpha × the mean squared norm of the atoms.
    max_iter : int or None
        Most iterations; None: 10 k + 100.
    tol : float
        The pursuit ends when the objective falls by no more than this share, as in
        :class:`GradientTrajectoryPursuit`.

    Attributes
    ----------
    coef_, support_, layers_, residual_path_, objective_path_, path_, steps_, kkt_, n_iter_, stop_reason_,
    n_features_in_, feature_names_in_
        As in :class:`NonNegativeOMP`. `kkt_` tells how far the weights are from the best on their support, which this
        method does not look for; subsets of `path_` are refitted.

    References
    ----------
    Mallat, Zhang, "Matching pursuits with time-frequency dictionaries", 1993.
    """

    tol: float

    def __init__(
        self,
        n_nonzero_coefs: int | None = None,
        *,
        alpha: float = 0.0,
        max_iter: int | None = None,
        tol: float = 1e-6,
    ) -> None:
        self.n_nonzero_coefs = n_nonzero_coefs
        self.alpha = alpha
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: Any, y: Any, callback: Callback | None = None) -> OneLayerPursuit:
        """Choose and weigh atoms of X for y, as :meth:`NonNegativeOMP.fit` does."""
        if self.max_iter is not None:
            require_count("max_iter", self.max_iter)
        return super().fit(X, y, callback)

    def _pursue(self, problem: PursuitProblem, budget: int, layer: Layer, steps: Steps) -> None:
        weights = np.zeros(problem.matrix.shape[1])
        curvature = np.where(problem.norms > 0, problem.norms**2 + problem.ridge, np.inf)
        order: list[int] = []
        steps.record(layer, 1, 0)
        for layer.n_iter in range(1, (self.max_iter or 10 * budget + 100) + 1):
            gradient = problem.scores(layer.fit) - problem.ridge * weights
            gradient[gradient <= problem.least_score(layer.fit)] = 0.0
            if len(order) == budget:
                gradient[weights == 0] = 0.0
            atom = int(np.argmax(gradient**2 / curvature))
            if gradient[atom] <= 0:
                layer.stop_reason = "no positive correlation"
                return
            step = gradient[atom] / curvature[atom]
            if weights[atom] == 0:
                order.append(atom)
            weights[atom] += step
            ids = np.array(order, dtype=np.int64)
            r = layer.fit.residual - step * problem.matrix.columns(ids[ids == atom]).astype(np.float64)
            fit = problem.evaluated(ids, weights[ids, None], r, 0.0)
            if not fit.improves(layer.fit, self.tol):
                layer.stop_reason = "converged"
                return
            layer.fit = fit
            steps.record(layer, 1, layer.n_iter)
            if fit.relative_residual <= MATCHED:
                layer.stop_reason = "target matched"
                return
        layer.stop_reason = "iteration limit"
