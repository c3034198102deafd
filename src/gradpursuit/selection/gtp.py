"""`gtp`: Gradient Trajectory Pursuit, the joint selection this package is named after."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from gradpursuit.config import GradientsSection
from gradpursuit.errors import SelectionError
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.pursuit import GradientTrajectoryPursuit
from gradpursuit.selection.base import Selection, SelectionProblem

_SETTINGS = ("alpha", "max_iter", "tol", "saturation", "max_coherence")
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
        settings = problem.pursuit.model_dump(include=set(_SETTINGS))
        if problem.pursuit.parts > 1:
            return _of_winners(problem, matrix, target, k, settings)
        solver = GradientTrajectoryPursuit(k, **settings).fit(matrix, target)
        evidence = pursuit_evidence(solver, matrix)
        evidence["copies"] = {problem.ids[copy]: problem.ids[of] for copy, of in solver.copies_.items()}
        return from_solver(solver, evidence)


def _of_winners(problem: SelectionProblem, matrix: Any, target: Any, k: int, settings: dict[str, Any]) -> Selection:
    """Two-level pursuit: of what each part of the pool chooses by itself, twice its share of the budget each."""
    parts = problem.pursuit.parts
    share = min(k, 2 * math.ceil(k / parts))
    ids = matrix.winners(target, share, parts, settings)
    squares = matrix.squared_norms()
    alpha = settings["alpha"] * float(squares.mean() / squares[ids].mean())
    solver = GradientTrajectoryPursuit(min(k, len(ids)), **{**settings, "alpha": alpha})
    solver.fit(matrix.columns(ids), target)
    evidence = pursuit_evidence(solver, matrix)
    evidence["copies"] = {problem.ids[ids[copy]]: problem.ids[ids[of]] for copy, of in solver.copies_.items()}
    evidence["two_level"] = {"parts": parts, "winners": len(ids), "share": share}
    chosen = from_solver(solver, evidence)
    return replace(chosen, indices=ids[chosen.indices])


def pursuit_evidence(solver: Any, matrix: Any) -> dict[str, Any]:
    """Passes, stop reasons, optimality and path of a fitted pursuit, as JSON values; on a cluster also the traffic."""
    spread = hasattr(matrix, "traffic")
    return {
        **({"traffic": {"workers": matrix.workers, **matrix.traffic.describe()}} if spread else {}),
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
