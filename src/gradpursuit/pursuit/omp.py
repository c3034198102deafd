"""Non-negative orthogonal matching pursuit: one atom for each pass, for comparison and for small budgets."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from scipy.linalg import LinAlgError, cholesky, solve_triangular

from gradpursuit.pursuit.base import OneLayerPursuit
from gradpursuit.pursuit.loop import FINAL, Layer, Steps
from gradpursuit.pursuit.matrix import Float64Array, IntArray
from gradpursuit.pursuit.problem import MATCHED, PursuitProblem, SupportFit

_SAFE_PIVOT = 1e-10  # squared, relative length of an atom outside the span of the others


class NonNegativeOMP(OneLayerPursuit):
    """Minimise ½‖A w − b‖² + ½ λ‖w‖² over w ≥ 0 by adding one atom at a time, at most k.

    Each iteration adds the atom of largest positive correlation with the residual (ties by id) and refits all
    weights, exactly, without negative ones; an atom whose weight becomes zero leaves the support. As
    everywhere with this rule, atoms of larger norm are preferred: pass unit columns if that is not wanted.

    Parameters
    ----------
    n_nonzero_coefs : int or None
        The budget k, 1 ≤ k ≤ N. None: a tenth of N.
    alpha : float
        Ridge, relative: λ = alpha × the mean squared norm of the atoms.
    tol : float
        The pursuit ends when the best atom lowers the objective by no more than this share (as in
        :class:`GradientTrajectoryPursuit`); such an atom adds nothing and is not taken.

    Attributes
    ----------
    coef_, support_, layers_, residual_path_, objective_path_, path_, steps_, kkt_, n_iter_, stop_reason_,
    n_features_in_, feature_names_in_
        As in :class:`GradientTrajectoryPursuit`, except: `support_` is in the order in which the atoms
        were chosen, `layers_` is all ones and `stop_reason_` has one entry ("budget filled", "target
        matched", "no positive correlation", "converged", "iteration limit" or "interrupted"). Copies are not
        looked for.

    References
    ----------
    Bruckstein, Elad, Zibulevsky, "On the uniqueness of nonnegative sparse solutions to underdetermined
    systems of equations", 2008 (non-negative OMP); Rubinstein, Zibulevsky, Elad, "Efficient implementation
    of the K-SVD algorithm using Batch-OMP", 2008 (the growing Cholesky factor).
    """

    tol: float

    def __init__(self, n_nonzero_coefs: int | None = None, *, alpha: float = 0.0, tol: float = 1e-10) -> None:
        self.n_nonzero_coefs = n_nonzero_coefs
        self.alpha = alpha
        self.tol = tol

    @property
    def _least_residual(self) -> float:
        """The relative residual at which the target is matched."""
        return MATCHED

    @property
    def _least_gain(self) -> float:
        """The share of the objective that an atom must gain."""
        return self.tol

    def _pursue(self, problem: PursuitProblem, budget: int, layer: Layer, steps: Steps) -> None:
        factor = GrowingCholesky()
        steps.record(layer, 1, 0)
        # Atoms can leave again, so passes are counted; the falling objective alone would bound them too late.
        while layer.n_iter < 10 * budget + 100:
            if len(layer.fit.ids) == budget:
                layer.stop_reason = "budget filled"
                return
            layer.n_iter += 1
            atom = _best_atom(problem, layer.fit)
            if atom is None:
                layer.stop_reason = "no positive correlation"
                return
            grown, factor = _refit(problem, layer.fit, atom, factor)
            if not grown.improves(layer.fit, self._least_gain):
                layer.stop_reason = "converged"
                return
            layer.fit = grown
            steps.record(layer, 1, layer.n_iter)
            if grown.relative_residual <= self._least_residual:
                layer.stop_reason = "target matched"
                return
        layer.stop_reason = "iteration limit"


class GradMatch(NonNegativeOMP):
    """The selection of GradMatch: non-negative OMP with a ridge, until the residual is small enough.

    Parameters, attributes and methods as in :class:`NonNegativeOMP`, but: `alpha` is 0.5, the paper's λ, relative to
    the mean squared norm; `tol` is the relative residual ‖b − A w‖/‖b‖ at which it ends with "target matched". (The
    authors' code has an absolute λ and drops negative weights one by one; here all weights are exact, with the same
    rule for the next atom.)

    References
    ----------
    Killamsetty, Sivasubramanian, Ramakrishnan, De, Iyer, "GRAD-MATCH: Gradient Matching based Data Subset Selection for
    Efficient Deep Model Training", arXiv 2103.00123.
    """

    def __init__(self, n_nonzero_coefs: int | None = None, *, alpha: float = 0.5, tol: float = 1e-4) -> None:
        super().__init__(n_nonzero_coefs, alpha=alpha, tol=tol)

    @property
    def _least_residual(self) -> float:
        return max(self.tol, MATCHED)

    @property
    def _least_gain(self) -> float:
        return 0.0


class GrowingCholesky:
    """The lower Cholesky factor of a Gram matrix to which one atom after the other is added."""

    def __init__(self) -> None:
        self._L = np.zeros((0, 0))
        self.size = 0

    @classmethod
    def of(cls, gram: Float64Array, ridge: float) -> GrowingCholesky:
        """The factor of gram [n, n] + ridge·I; its size is below n if an atom is dependent."""
        factor = cls()
        with suppress(LinAlgError):
            L = cholesky(gram + ridge * np.eye(len(gram)), lower=True, check_finite=False)
            if (np.diagonal(L) ** 2 > _SAFE_PIVOT * (np.diagonal(gram) + ridge)).all():
                factor._L, factor.size = L, len(gram)
                return factor
        for i, row in enumerate(gram):
            if not factor.append(row[:i], row[i] + ridge):
                break
        return factor

    def append(self, cross: Float64Array, square: float) -> bool:
        """Add an atom with products `cross` [size] and squared length `square`; False if it is dependent."""
        n = self.size
        row = solve_triangular(self._L[:n, :n], cross, lower=True) if n else np.empty(0)
        pivot = square - float(row @ row)
        if pivot <= _SAFE_PIVOT * square:
            return False
        if n == len(self._L):
            larger = np.zeros((2 * n + 16, 2 * n + 16))
            larger[:n, :n] = self._L[:n, :n]
            self._L = larger
        self._L[n, :n], self._L[n, n] = row, np.sqrt(pivot)
        self.size += 1
        return True

    def solve(self, q: Float64Array) -> Float64Array:
        """The solution of G x = q."""
        L = self._L[: self.size, : self.size]
        return solve_triangular(L, solve_triangular(L, q, lower=True), lower=True, trans="T")


def _best_atom(problem: PursuitProblem, best: SupportFit) -> int | None:
    ids, _ = problem.ranking(best).without(best.ids).next(1)
    return int(ids[0]) if ids.size else None


def _refit(
    problem: PursuitProblem, best: SupportFit, atom: int, factor: GrowingCholesky
) -> tuple[SupportFit, GrowingCholesky]:
    """The fit on the support with `atom`: from scratch only where a weight turns negative."""
    new: IntArray = np.array([atom], dtype=np.int64)
    ids = np.concatenate([best.ids, new])
    problem.held.load(new)
    cross = problem.gram.gram(new, ids)[0]
    if factor.size == len(best.ids) and factor.append(cross[:-1], cross[-1] + problem.ridge):
        x = factor.solve(problem.held.atb(ids)[:, 0])[:, None]
        if (x > 0).all():
            return problem.evaluated(ids, x, problem.gram.residual(ids, x), 0.0), factor
    x, r, _ = problem.gram.solve(ids, np.append(best.weights, [[0.0]], axis=0), problem.ridge, FINAL)
    positive = np.sort(problem.ranked(ids, x))
    ids, x = ids[positive], x[positive]
    return problem.evaluated(ids, x, r, 0.0), GrowingCholesky.of(problem.gram.gram(ids), problem.ridge)
