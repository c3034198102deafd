"""`omp`: non-negative orthogonal matching pursuit on the same problem, one example at a time."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from gradpursuit.config import MatchingSection, Number
from gradpursuit.gradients.preconditioner import PreconditionerLabel
from gradpursuit.pursuit import NonNegativeOMP
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.gtp import from_solver, preconditioner_of, pursuit_evidence, traffic_of
from gradpursuit.selection.scores import settings_of


class OMP(MatchingSection):
    """Greedy: each step adds the example that correlates most with what is left, then refits all weights.

    Settings that are not given here are those of section `pursuit`.
    """

    source: ClassVar[str] = "Bruckstein, Elad, Zibulevsky, 2008 (non-negative OMP)"
    stochastic: ClassVar[bool] = False

    preconditioner: PreconditionerLabel | None = Field(None, description="null: that of section gradients")
    alpha: Number | None = Field(None, ge=0, description="ridge; null: that of section pursuit")

    def needs(self, settings: Settings) -> Needs:
        """Gradients."""
        return Needs((preconditioner_of(self.preconditioner, settings),), target="mean", passes="k")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """At most `k` examples; fewer when no further one correlates with the residual.

        Raises:
            SelectionError: no pool example correlates with the target.
        """
        matrix, target = problem.matching(self.preconditioner, settings_of(self, problem.pursuit))
        alpha = problem.pursuit.alpha if self.alpha is None else self.alpha
        solver = NonNegativeOMP(k, alpha=alpha).fit(matrix, target)
        return from_solver(solver, pursuit_evidence(solver) | traffic_of(matrix))
