"""Non-negative orthogonal matching pursuit: one atom for each pass, for comparison and for small budgets."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import solve_triangular

from gradpursuit.pursuit.base import MATCHED, Layer, PursuitProblem, PursuitRegressor, SupportFit, record
from gradpursuit.pursuit.matrix import Float64Array, IntArray

_SAFE_PIVOT = 1e-10  # squared, relative length of an atom outside the span of the others


class NonNegativeOMP(PursuitRegressor):
    """Minimise ½‖A w − b‖² + ½ λ‖w‖² over w ≥ 0 by adding one atom at a time, at most k.

    Each iteration adds the atom of largest positive correlation with the residual (ties by id) and refits all
    weights, exactly, without negative ones; an atom whose weight becomes zero leaves the support. As
    everywhere with this rule, atoms of larger norm are preferred: pass unit columns if that is not wanted.

    Parameters
    ----------
    n_nonzero_coefs : int
        The budget k, 1 ≤ k ≤ N.
    alpha : float
        Ridge, relative: λ = alpha × the mean squared norm of the atoms.
    tol : float
        The pursuit ends when the best atom lowers the objective by no more than this share (as in
        :class:`GradientTrajectoryPursuit`); such an atom adds nothing and is not taken.

    Attributes
    ----------
    coef_, support_, layers_, residual_path_, objective_path_, path_, kkt_, n_iter_, stop_reason_, copies_,
    n_features_in_
        As in :class:`GradientTrajectoryPursuit`, except: `support_` is in the order in which the atoms
        were chosen, `layers_` is all ones, `stop_reason_` has one entry ("budget filled", "target
        matched", "no positive correlation", "converged" or "iteration limit"), and `copies_` is empty:
        copies are not looked for.

    References
    ----------
    Bruckstein, Elad, Zibulevsky, "On the uniqueness of nonnegative sparse solutions to underdetermined
    systems of equations", 2008 (non-negative OMP); Rubinstein, Zibulevsky, Elad, "Efficient implementation
    of the K-SVD algorithm using Batch-OMP", 2008 (the growing Cholesky factor).
    """

    def __init__(self, n_nonzero_coefs: int, *, alpha: float = 0.0, tol: float = 1e-10) -> None:
        self.n_nonzero_coefs = n_nonzero_coefs
        self.alpha = alpha
        self.tol = tol

    def fit(self, X: Any, y: Any) -> NonNegativeOMP:
        """Choose and weigh atoms of X ([D, N] array, tensor or `GradientMatrix`) for the target y [D].

        Raises :class:`PursuitError` as :meth:`GradientTrajectoryPursuit.fit` does.
        """
        problem = self._problem(X, y)
        layer = self._pursue(problem)
        self._publish(problem, [layer], [layer.stop_reason], {})
        return self

    def _pursue(self, problem: PursuitProblem) -> Layer:
        best, factor = problem.empty(), GrowingCholesky()
        path, passes, reason = [record(1, 0, best)], 0, "budget filled"
        # Atoms can leave again, so passes are counted; the falling objective alone would bound them too late.
        while len(best.ids) < self.n_nonzero_coefs:
            if passes == 10 * self.n_nonzero_coefs + 100:
                reason = "iteration limit"
                break
            passes += 1
            atom = _best_atom(problem, best)
            if atom is None:
                reason = "no positive correlation"
                break
            grown, factor = _refit(problem, best, atom, factor)
            if not grown.improves(best, self.tol):
                reason = "converged"
                break
            best = grown
            path.append(record(1, passes, best))
            if best.relative_residual <= MATCHED:
                reason = "target matched"
                break
        return Layer(best, path, passes, reason)


class GrowingCholesky:
    """The lower Cholesky factor of a Gram matrix to which one atom after the other is added."""

    def __init__(self) -> None:
        self._L = np.zeros((0, 0))
        self.size = 0

    @classmethod
    def of(cls, gram: Float64Array, ridge: float) -> GrowingCholesky:
        """The factor of gram [n, n] + ridge·I; its size is below n if an atom is dependent."""
        factor = cls()
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
    scores = problem.matrix.correlate(best.residual)
    scores[best.ids] = 0.0
    scores[scores <= problem.least_score(best)] = 0.0
    atom = int(np.argmax(scores))
    return atom if scores[atom] > 0 else None


def _refit(
    problem: PursuitProblem, best: SupportFit, atom: int, factor: GrowingCholesky
) -> tuple[SupportFit, GrowingCholesky]:
    """The fit on the support with `atom`: from scratch only where a weight turns negative."""
    new: IntArray = np.array([atom], dtype=np.int64)
    ids = np.concatenate([best.ids, new])
    problem.cache.load(new)
    cross = problem.cache.gram(new, ids)[0]
    if factor.size == len(best.ids) and factor.append(cross[:-1], cross[-1] + problem.ridge):
        x = factor.solve(problem.cache.atb(ids))
        if (x > 0).all():
            return problem.evaluate(ids, x, problem.violation(ids, x)), factor
    x, kkt = problem.solve(ids, np.append(best.weights, 0.0))
    positive = problem.counts(ids, x)
    ids, x = ids[positive], x[positive]
    return problem.evaluate(ids, x, kkt), GrowingCholesky.of(problem.cache.gram(ids), problem.ridge)
