"""`less`: the k examples of largest gradient influence, each scored on its own."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from gradpursuit.gradients.preconditioner import PreconditionerLabel
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.scores import InfluenceSection, Reducer, reduced


class LESS(InfluenceSection):
    """Σ_t η̄_t cos(U_t[i], mean of the unit target gradients), the maximum over target groups, then top-k.

    Adam features without bias correction for the pool, plain gradients for the target (arXiv 2402.04333).
    """

    source: ClassVar[str] = "Xia et al., arXiv 2402.04333"
    stochastic: ClassVar[bool] = False

    preconditioner: PreconditionerLabel | None = Field(
        "adam-uncorrected", description="of the gradients; null: that of section gradients"
    )
    reducer: Reducer = Field("max", description="of the influences on the target groups")

    def needs(self, settings: Settings) -> Needs:
        """Gradients of its own kind."""
        return Needs((self.kind(settings),), target="mean")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """The `k` highest scores; equal scores in pool order."""
        scores = problem.once(("influence", self), lambda: reduced(self.on_groups(problem), self.reducer))
        return Selection.best(scores, k)
