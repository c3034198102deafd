"""`topk`: what the pursuit sees, without the pursuit: each example on its own."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from gradpursuit.config import MatchingSection
from gradpursuit.gradients.preconditioner import PreconditionerLabel
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.gtp import preconditioner_of
from gradpursuit.selection.scores import Array, Reducer, reduced, settings_of


class TopK(MatchingSection):
    """The k columns of the pursuit's matrix A with the largest cosine to its target b.

    Features, blocks and normalisation are those of `gtp`, so that the difference to it is what choosing jointly adds;
    with unit rows it is the limit of `gtp` for a large ridge. Settings that are not given here are those of section
    `pursuit`.
    """

    source: ClassVar[str] = "this package: GTP's features (arXiv 2410.16710) with the top-k of LESS (arXiv 2402.04333)"
    stochastic: ClassVar[bool] = False

    preconditioner: PreconditionerLabel | None = Field(None, description="null: that of section gradients")
    reducer: Reducer = Field(
        "mean", description="several target groups: cosine to the mean of their means, or the largest of the cosines"
    )

    def needs(self, settings: Settings) -> Needs:
        """Gradients."""
        return Needs((preconditioner_of(self.preconditioner, settings),), target="mean")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """The `k` highest cosines; equal ones in pool order."""
        return Selection.best(problem.once(("topk", self), lambda: self._cosines(problem)), k)

    def _cosines(self, problem: SelectionProblem) -> Array:
        per_group = self.reducer == "max"
        matrix, target = problem.matching(self.preconditioner, settings_of(self, problem.pursuit), per_group=per_group)
        goals = target.reshape(len(target), -1)
        lengths = np.sqrt(matrix.squared_norms())
        products = matrix.correlate(goals / np.linalg.norm(goals, axis=0))
        cosines = np.divide(products, lengths[:, None], out=np.zeros_like(products), where=lengths[:, None] > 0)
        return reduced(cosines, self.reducer)
