"""`gtp`: Gradient Trajectory Pursuit, the joint selection this package is named after."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradpursuit.config import GradientsSection
from gradpursuit.errors import SelectionError
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.pursuit import GradientTrajectoryPursuit
from gradpursuit.selection.base import Selection, SelectionProblem

_PATH = ("layer", "iteration", "support_size", "relative_residual", "objective")


class GTP:
    """Examples whose weighted gradients reproduce the target's along the trajectory (arXiv 2410.16710)."""

    name = "gtp"
    source = "Deng, Li, Li, arXiv 2410.16710"
    stochastic = False

    def needs(self, gradients: GradientsSection) -> list[Preconditioner]:
        """The configured preconditioner."""
        return [Preconditioner(gradients.preconditioner)]

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """Pursue the target's mean trajectory; fewer than `k` only with `saturation="stop"` or an exhausted pool.

        Raises:
            SelectionError: no pool example correlates with the target.
        """
        matrix, target = problem.matching()
        settings = problem.pursuit
        solver = GradientTrajectoryPursuit(
            k,
            alpha=settings.alpha,
            max_iter=settings.max_iter,
            tol=settings.tol,
            saturation=settings.saturation,
            max_coherence=settings.max_coherence,
        ).fit(matrix, target)
        evidence = pursuit_evidence(solver)
        evidence["copies"] = {problem.ids[copy]: problem.ids[of] for copy, of in solver.copies_.items()}
        return from_solver(solver, evidence)


def pursuit_evidence(solver: Any) -> dict[str, Any]:
    """Passes, stop reasons, optimality and path of a fitted pursuit, as JSON values."""
    return {
        "passes": int(solver.n_iter_),
        "stop_reason": list(solver.stop_reason_),
        "kkt": float(solver.kkt_),
        "relative_residual": float(solver.residual_path_[-1]),
        "path": [{name: float(getattr(step, name)) for name in _PATH} for step in solver.steps_],
    }


def from_solver(solver: Any, evidence: dict[str, Any]) -> Selection:
    """The support of a fitted pursuit, with weights of mean 1.

    Raises:
        SelectionError: the support is empty.
    """
    if not len(solver.support_):
        raise SelectionError(
            "no pool example's gradient points where the target's does (no positive correlation); "
            "the pool cannot help this target at these checkpoints"
        )
    weights = solver.coef_[solver.support_]
    return Selection(np.asarray(solver.support_), weights / weights.mean(), np.asarray(solver.layers_), evidence)
