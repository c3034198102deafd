"""Gradient Trajectory Pursuit: choose many atoms at once, refit without negative weights, prune, repeat."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np

from gradpursuit.errors import PursuitError, nearest
from gradpursuit.pursuit.base import PursuitRegressor, require_count
from gradpursuit.pursuit.joined import JoinedMatrix
from gradpursuit.pursuit.loop import FINAL, Callback, Pursuit, Steps
from gradpursuit.pursuit.matrix import Float64Array, GradientMatrix, as_matrix
from gradpursuit.pursuit.path import share_out
from gradpursuit.pursuit.problem import PursuitProblem, SupportFit, require_nonzero

_SATURATION = ("layers", "stop")
_TARGETS = ("mean", "balanced", "split")


class GradientTrajectoryPursuit(PursuitRegressor):
    """Minimise ½‖A w − b‖² + ½ λ‖w‖² over w ≥ 0 with at most k non-zero weights, all atoms chosen jointly.

    Each iteration reads the matrix once: the k/4 atoms of largest positive correlation with the residual
    join the support, the weights are fitted by non-negative least squares, the k largest contributions
    x_i‖a_i‖ are kept and refitted. A merge that does not lower the objective is tried again with far fewer
    new atoms, down to one (no further pass is needed); if none helps, the pursuit has converged. The
    objective never rises.

    Parameters
    ----------
    n_nonzero_coefs : int or None
        The budget k, 1 ≤ k ≤ N. None: a tenth of N.
    alpha : float
        Ridge, relative: λ = alpha × the mean squared norm of the atoms. 0 matches the gradient; a large alpha
        approaches the k largest correlations.
    max_iter : int
        Most passes over the matrix for one layer.
    tol : float or None
        The pursuit ends when no step lowers the objective by more than this share of what is left of it, or of
        what has been gained so far if that is less. None: 1e-4 for budgets up to 200, 1e-3 for larger ones.
    saturation : {"layers", "stop"}
        What to do if fewer than k atoms can have a positive weight. "layers": keep them as layer 1, remove
        them and their copies from the pool, and pursue the same target with the rest of the budget, until
        k are chosen or no atom left correlates with the target. The weights of each layer match the target
        on their own. "stop": return fewer than k.
    max_coherence : float or None
        Atoms with a cosine of at least this are copies; one of them may be chosen, the one already in the
        support or else the one of lowest id, and the others are set aside for all layers. Copies never fill
        a budget. None: copies are not looked for.
    targets : {"mean", "balanced", "split"}
        What to do with several targets, y [D, q]. "mean": pursue their mean. "balanced": pursue all of them, each
        divided by its length, with one shared support; atoms are scored by the root of the sum of their squared
        positive correlations, and the weight of an atom is the mean of its weights for each target. "split": pursue
        each on its own with its share of the budget; the union may be smaller than k, and weights are averaged.
    warm_start : bool
        Whether `fit` begins from the layers of the fit before (for the same atoms and a larger k, another alpha or a
        changed target), instead of from nothing. For new atoms see :meth:`extend`.

    Attributes
    ----------
    coef_ : float64 [N]
        Weights, zero outside the support. The weights of a layer are that layer's own solution.
    support_ : int64 [m]
        Chosen ids, m ≤ k: by layer, then by falling contribution x_i‖a_i‖, ties by id.
    layers_ : int64 [m]
        Layer of each chosen id, from 1.
    path_ : BudgetPath
        The subsets for every budget up to k: ``path_[j].support``, ``path_[j].weights``.
    residual_path_, objective_path_ : float64 [accepted iterations of layer 1, plus one]
        ‖b − A w‖/‖b‖ and the objective, from w = 0 (or the warm start) on; with "split", of the first target.
    steps_ : list of PursuitStep
        (layer, iteration, support_size, relative_residual, objective, seconds, bytes_read) after each accepted
        iteration of each layer.
    group_residuals_ : float64 [q]
        With y [D, q]: ‖b_h − A w_h‖/‖b_h‖ for the best weights w_h that the first layer's atoms have for target h
        alone.
    kkt_ : float
        Largest violation of the optimality conditions on the support of a layer, relative (see `nnls`).
    n_iter_ : int
        Passes over the matrix made to correlate, in all layers, with those that led to no further step.
    stop_reason_ : list of str
        Why each layer ended: "converged" (with its whole budget), "saturated" (with fewer), "target matched",
        "no positive correlation", "iteration limit" or "interrupted". If the pool was exhausted before k were chosen
        the last entry, "no positive correlation", belongs to the layer that could not begin.
    copies_ : dict of int to int
        Each id that was set aside -> the id it is a copy of.
    n_features_in_ : int
        N.
    feature_names_in_ : object [N]
        Names of the columns, if X is a data frame with names.

    Notes
    -----
    Equal input gives equal output; equal correlations or contributions are ordered by id. Atoms of length zero are
    never chosen. Where fewer than k atoms can be, `support_` is shorter and `stop_reason_` says why; k = N, k above
    the rank, N = 1 and D = 1 are ordinary. No atom that correlates with the target: an empty support. A target of
    zero, and values in X or y that are sparse, not real or not finite: :class:`PursuitError`. float16, float32,
    float64 and integers in any memory layout give the same support, up to the rounding of the data.

    References
    ----------
    Deng, Li, Li, "Influential Language Data Selection via Gradient Trajectory Pursuit", arXiv 2410.16710.
    Needell, Tropp, "CoSaMP", arXiv 0803.2392 (merge, fit, prune). Fewer and fewer atoms, layers and copies are this
    package's own.
    """

    _tol_may_be_none = True

    def __init__(
        self,
        n_nonzero_coefs: int | None = None,
        *,
        alpha: float = 0.3,
        max_iter: int = 50,
        tol: float | None = None,
        saturation: str = "layers",
        max_coherence: float | None = 0.999,
        targets: str = "mean",
        warm_start: bool = False,
    ) -> None:
        self.n_nonzero_coefs = n_nonzero_coefs
        self.alpha = alpha
        self.max_iter = max_iter
        self.tol = tol
        self.saturation = saturation
        self.max_coherence = max_coherence
        self.targets = targets
        self.warm_start = warm_start

    def fit(self, X: Any, y: Any, callback: Callback | None = None) -> GradientTrajectoryPursuit:
        """Choose and weigh atoms of X ([D, N] array, tensor or `GradientMatrix`) for y [D] or several targets [D, q].

        callback: called after every accepted iteration with its :class:`PursuitStep` and the ids of the support.
        KeyboardInterrupt, from Ctrl-C or from the callback, ends the pursuit with the best support so far and the stop
        reason "interrupted".

        Raises :class:`PursuitError` if a parameter is out of range, k > N, y is zero, or X or y is not finite
        or does not fit. A target that no atom correlates with is an outcome, not an error: an empty support.
        """
        starts: list[list[SupportFit]] = getattr(self, "_fits", []) if self.warm_start else []
        matrix, target = self._numbers(X, y, same_pool=bool(starts))
        return self._fit(matrix, target, starts, {}, callback)

    def extend(self, X_new: Any, callback: Callback | None = None) -> GradientTrajectoryPursuit:
        """Go on with new atoms X_new [D, n], which get the ids N, …, N + n − 1; of the old, only those chosen are read.

        Each layer begins from its atoms and may exchange them for new ones. The residual is close to, not equal to,
        that of a fresh `fit` to all atoms, in which old atoms that were not chosen compete again. Names of
        atoms are forgotten.

        Raises :class:`PursuitError` if nothing was fitted in this process, or X_new does not fit.
        """
        if not hasattr(self, "_parts"):
            raise PursuitError("there is no pursuit to go on with: call fit first, in the same process.")
        joined = JoinedMatrix(self._parts[0].problem.matrix, as_matrix(X_new), read_all=False)
        self._check_names(joined, reset=True)
        return self._fit(joined, self._y, self._fits, dict(self.copies_), callback)

    def __getstate__(self) -> dict[str, Any]:
        """Without the matrix that was fitted to, which `extend` needs."""
        state = dict(super().__getstate__())
        return {name: value for name, value in state.items() if name not in ("_parts", "_y")}

    def _fit(
        self,
        matrix: GradientMatrix,
        y: Float64Array,
        starts: list[list[SupportFit]],
        copies: dict[int, int],
        callback: Callback | None,
    ) -> GradientTrajectoryPursuit:
        self._check_own_parameters()
        budget = self._budget(matrix)
        targets = self._split(y, budget)
        parts: list[Pursuit] = []
        for number, (share, b) in enumerate(zip(share_out(budget, len(targets)), targets, strict=True)):
            problem = PursuitProblem(matrix, b, self.alpha, share)
            pool = problem.pool(self.max_coherence)
            pool.set_aside(parts[-1].pool.copies if parts else copies)
            tol = problem.pace.tol if self.tol is None else self.tol
            steps = Steps(problem, callback, parts[-1].steps if parts else None)
            part = Pursuit(problem, pool, self.max_iter, tol, self.saturation, steps)
            part.run(share, starts[number] if number < len(starts) else [])
            parts.append(part)
            if part.interrupted:
                break
        self._publish([(part.problem, part.layers) for part in parts])
        # With "split", a copy set aside for one target may have been chosen for another before.
        chosen = set(self.support_.tolist())
        self.copies_ = {copy: of for copy, of in parts[-1].pool.copies.items() if copy not in chosen}
        self._parts, self._y = parts, y
        self._fits = [[layer.fit for layer in part.layers] for part in parts]
        self.__dict__.pop("group_residuals_", None)  # of another fit
        if y.ndim == 2:
            self.group_residuals_ = self._group_residuals(matrix, y)
        return self

    def _check_own_parameters(self) -> None:
        require_count("max_iter", self.max_iter)
        for name, known in (("saturation", _SATURATION), ("targets", _TARGETS)):
            value = getattr(self, name)
            if value not in known:
                raise PursuitError(f"{name} is {value!r}; {nearest(str(value), known)}")
        coherence = self.max_coherence
        if coherence is not None and not (isinstance(coherence, Real) and 0 < float(coherence) <= 1):
            raise PursuitError(
                f"max_coherence is {coherence!r}; it must be a cosine in (0, 1], or None to allow copies."
            )

    def _split(self, y: Float64Array, budget: int) -> list[Float64Array]:
        """The targets of the pursuits to be made, one after the other."""
        if y.ndim == 1:
            return [y]
        require_nonzero(y)
        if self.targets != "split":
            return [y] if self.targets == "balanced" else [y.mean(axis=1)]
        if budget < y.shape[1]:
            raise PursuitError(
                f"n_nonzero_coefs is {budget}, but {y.shape[1]} targets share it, and each needs one atom at least. "
                'Ask for more, or pursue them together with targets="balanced".'
            )
        return list(y.T)

    def _group_residuals(self, matrix: GradientMatrix, y: Float64Array) -> Float64Array:
        ids = self.support_[self.layers_ == 1]
        problem = PursuitProblem(matrix, y, self.alpha, max(1, len(ids)))
        problem.held.load(ids)
        fit = problem.fit(ids, np.repeat(self.coef_[ids, None], y.shape[1], axis=1), None, FINAL)
        return np.linalg.norm(fit.residual, axis=0)
