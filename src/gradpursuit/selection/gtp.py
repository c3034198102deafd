"""`gtp`: Gradient Trajectory Pursuit, the joint selection this package is named after."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from pydantic import Field

from gradpursuit.config import PursuitSection
from gradpursuit.errors import SelectionError
from gradpursuit.gradients.preconditioner import Preconditioner, PreconditionerLabel
from gradpursuit.pursuit import GradientTrajectoryPursuit, Subset
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.scores import settings_of

_PATH = ("layer", "iteration", "support_size", "relative_residual", "objective")


class GTP(PursuitSection):
    """Examples whose weighted gradients reproduce the target's along the trajectory (arXiv 2410.16710).

    Settings that are not given here are those of section `pursuit`.
    """

    source: ClassVar[str] = "Deng, Li, Li, arXiv 2410.16710"
    stochastic: ClassVar[bool] = False

    preconditioner: PreconditionerLabel | None = Field(None, description="null: that of section gradients")

    def needs(self, settings: Settings) -> Needs:
        """Gradients."""
        return Needs((preconditioner_of(self.preconditioner, settings),), target="mean")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """Pursue the target's trajectory; fewer than `k` only with `saturation="stop"` or an exhausted pool.

        Raises:
            SelectionError: no pool example correlates with the target.
        """
        settings = settings_of(self, problem.pursuit)
        assert isinstance(settings, PursuitSection)
        several = settings.targets != "mean"
        matrix, target = problem.matching(self.preconditioner, settings, per_group=several)
        solver = GradientTrajectoryPursuit(
            k,
            alpha=settings.alpha,
            max_iter=settings.max_iter,
            tol=settings.tol,
            saturation=settings.saturation,
            max_coherence=settings.max_coherence,
            targets=settings.targets,
        ).fit(matrix, target)
        evidence = pursuit_evidence(solver)
        evidence["copies"] = {problem.ids[copy]: problem.ids[of] for copy, of in solver.copies_.items()}
        if several:
            evidence["group_residuals"] = solver.group_residuals_.tolist()
        return from_solver(solver, evidence)


def preconditioner_of(label: PreconditionerLabel | None, settings: Settings) -> Preconditioner:
    """The preconditioner of that label; None: the configured one."""
    return Preconditioner.labelled(label or settings.gradients.preconditioner)


def pursuit_evidence(solver: Any) -> dict[str, Any]:
    """Passes, stop reasons, optimality and iterations of a fitted pursuit, as JSON values."""
    return {
        "passes": int(solver.n_iter_),
        "stop_reason": list(solver.stop_reason_),
        "kkt": float(solver.kkt_),
        "relative_residual": float(solver.residual_path_[-1]),
        "path": [{name: float(getattr(step, name)) for name in _PATH} for step in solver.steps_],
    }


def from_solver(solver: Any, evidence: dict[str, Any]) -> Selection:
    """The support of a fitted pursuit and of the budgets on its path, with weights of mean 1; the knee.

    Raises:
        SelectionError: the support is empty.
    """
    require_support(solver.support_)
    kept = dict(solver.path_)
    budgets = [
        {"budget": budget, "relative_residual": float(subset.relative_residual), "objective": float(subset.objective)}
        for budget, subset in kept.items()
    ]
    evidence = {**evidence, "budgets": budgets, "knee": solver.knee()._asdict()}
    smaller = [_selection(subset) for budget, subset in kept.items() if budget < len(solver.path_)]
    return replace(_selection(solver.path_.whole()), evidence=evidence, path=tuple(smaller))


def _selection(subset: Subset) -> Selection:
    return Selection(subset.support, subset.weights / subset.weights.mean(), subset.layers)


def require_support(support: Any) -> None:
    """Refuse the outcome of a pursuit that found nobody.

    Raises:
        SelectionError: the support is empty.
    """
    if not len(support):
        raise SelectionError(
            "no pool example's gradient points where the target's does (no positive correlation); "
            "the pool cannot help this target at these checkpoints"
        )
