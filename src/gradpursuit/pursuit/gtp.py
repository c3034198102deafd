"""Gradient Trajectory Pursuit: choose many atoms at once, refit without negative weights, prune, repeat."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np

from gradpursuit.errors import PursuitError, nearest
from gradpursuit.pursuit.base import (
    MATCHED,
    Layer,
    PursuitProblem,
    PursuitRegressor,
    SupportFit,
    record,
    require_count,
)
from gradpursuit.pursuit.candidates import CandidatePool
from gradpursuit.pursuit.matrix import IntArray

_SATURATION = ("layers", "stop")


class GradientTrajectoryPursuit(PursuitRegressor):
    """Minimise ½‖A w − b‖² + ½ λ‖w‖² over w ≥ 0 with at most k non-zero weights, all atoms chosen jointly.

    Each iteration reads the matrix once: the 2k atoms of largest positive correlation with the residual
    join the support, the weights are fitted by non-negative least squares, the k largest contributions
    x_i‖a_i‖ are kept and refitted. A merge that does not lower the objective is tried again with half as
    many new atoms, down to one (no further pass is needed); if none helps, the pursuit has converged. The
    objective never rises.

    Parameters
    ----------
    n_nonzero_coefs : int
        The budget k, 1 ≤ k ≤ N.
    alpha : float
        Ridge, relative: λ = alpha × the mean squared norm of the atoms. 0 matches the gradient; a large alpha
        approaches the k largest correlations.
    max_iter : int
        Most passes over the matrix for one layer.
    tol : float
        The pursuit ends when no step lowers the objective by more than this share of what is left of it, or of
        what has been gained so far if that is less.
    saturation : {"layers", "stop"}
        What to do if fewer than k atoms can have a positive weight. "layers": keep them as layer 1, remove
        them and their copies from the pool, and pursue the same target with the rest of the budget, until
        k are chosen or no atom left correlates with the target. The weights of each layer match the target
        on their own. "stop": return fewer than k.
    max_coherence : float or None
        Atoms with a cosine of at least this are copies; one of them may be chosen, the one already in the
        support or else the one of lowest id, and the others are set aside for all layers. Copies never fill
        a budget. None: copies are not looked for.

    Attributes
    ----------
    coef_ : float64 [N]
        Weights, zero outside the support. The weights of a layer are that layer's own solution.
    support_ : int64 [m]
        Chosen ids, m ≤ k: by layer, then by falling contribution x_i‖a_i‖, ties by id.
    layers_ : int64 [m]
        Layer of each chosen id, from 1.
    residual_path_, objective_path_ : float64 [accepted iterations of layer 1, plus one]
        ‖b − A w‖/‖b‖ and the objective, from w = 0 on.
    path_ : list of PathRecord
        (layer, iteration, support_size, relative_residual, objective) after each accepted iteration of
        each layer.
    kkt_ : float
        Largest violation of the optimality conditions on the support of a layer, relative (see `nnls`).
    n_iter_ : int
        Passes over the matrix made to correlate, in all layers, with those that led to no further step.
    stop_reason_ : list of str
        Why each layer ended: "converged" (with its whole budget), "saturated" (with fewer), "target matched",
        "no positive correlation" or "iteration limit". If the pool was exhausted before k were chosen the
        last entry, "no positive correlation", belongs to the layer that could not begin.
    copies_ : dict of int to int
        Each id that was set aside -> the id it is a copy of.
    n_features_in_ : int
        N.

    Equal input gives equal output; equal correlations or contributions are ordered by id.

    References
    ----------
    Deng, Li, Li, "Influential Language Data Selection via Gradient Trajectory Pursuit", arXiv 2410.16710.
    Needell, Tropp, "CoSaMP", arXiv 0803.2392 (merge, fit, prune). Halving, layers and copies are this
    package's own.
    """

    def __init__(
        self,
        n_nonzero_coefs: int,
        *,
        alpha: float = 0.3,
        max_iter: int = 50,
        tol: float = 1e-6,
        saturation: str = "layers",
        max_coherence: float | None = 0.999,
    ) -> None:
        self.n_nonzero_coefs = n_nonzero_coefs
        self.alpha = alpha
        self.max_iter = max_iter
        self.tol = tol
        self.saturation = saturation
        self.max_coherence = max_coherence

    def fit(self, X: Any, y: Any) -> GradientTrajectoryPursuit:
        """Choose and weigh atoms of X ([D, N] array, tensor or `GradientMatrix`) for the target y [D].

        Raises :class:`PursuitError` if a parameter is out of range, k > N, y is zero, or X or y is not finite
        or does not fit. A target that no atom correlates with is an outcome, not an error: an empty support.
        """
        self._check_own_parameters()
        problem = self._problem(X, y)
        pool = problem.pool(self.max_coherence)
        layers: list[Layer] = []
        remaining = self.n_nonzero_coefs
        while remaining > 0:
            layer = self._pursue(problem, pool, len(layers) + 1, remaining)
            layers.append(layer)
            remaining -= len(layer.fit.ids)
            pool.take(layer.fit.ids)
            if not len(layer.fit.ids) or self.saturation == "stop":
                break
        self._publish(problem, layers, [layer.stop_reason for layer in layers], pool.copies)
        return self

    def _check_own_parameters(self) -> None:
        require_count("max_iter", self.max_iter)
        if self.saturation not in _SATURATION:
            raise PursuitError(f"saturation is {self.saturation!r}; {nearest(str(self.saturation), _SATURATION)}")
        coherence = self.max_coherence
        if coherence is not None and not (isinstance(coherence, Real) and 0 < float(coherence) <= 1):
            raise PursuitError(
                f"max_coherence is {coherence!r}; it must be a cosine in (0, 1], or None to allow copies."
            )

    def _pursue(self, problem: PursuitProblem, pool: CandidatePool, number: int, budget: int) -> Layer:
        """One layer: at most `budget` atoms of the pool."""
        best = problem.empty()
        path = [record(number, 0, best)]
        held = best.ids
        for passes in range(1, self.max_iter + 1):
            problem.cache.keep(np.concatenate([pool.taken, held]))
            scores = problem.matrix.correlate(best.residual)
            candidates = pool.draw(scores, best.ids, 2 * budget, problem.least_score(best))
            if not candidates.size:
                return Layer(best, path, passes, "no positive correlation")
            held = np.concatenate([best.ids, candidates])
            better = self._improve(problem, best, candidates, budget)
            if better is None:
                return Layer(best, path, passes, "converged" if len(best.ids) == budget else "saturated")
            best = better
            path.append(record(number, passes, best))
            if best.relative_residual <= MATCHED:
                return Layer(best, path, passes, "target matched")
        return Layer(best, path, self.max_iter, "iteration limit")

    def _improve(
        self, problem: PursuitProblem, best: SupportFit, candidates: IntArray, budget: int
    ) -> SupportFit | None:
        """Merge, fit, prune, refit; with fewer candidates as long as the objective does not fall."""
        while candidates.size:
            merged = np.concatenate([best.ids, candidates])
            start = np.concatenate([best.weights, np.zeros(candidates.size)])
            fit = problem.fit(merged, start, budget)
            if fit.improves(best, self.tol):
                return fit
            candidates = candidates[: candidates.size // 2]
        return None
