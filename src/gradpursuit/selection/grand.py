"""`grand`: the examples with the largest, or the smallest, gradients."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.scores import KeepSection

PLAIN = Preconditioner("identity")


class GraNd(KeepSection):
    """GraNd (arXiv 2107.07075): the norm of an example's gradient (before the sketch), early in training.

    The paper averages over ten runs; here it is the mean over the checkpoints of one warm-up. Of losses
    that are means over tokens, short ones have larger gradients.
    """

    source: ClassVar[str] = "Paul, Ganguli, Dziugaite, arXiv 2107.07075"
    stochastic: ClassVar[bool] = False

    at: Literal["mean", "first"] = Field("mean", description="of all checkpoints, or of the first one")

    def needs(self, settings: Settings) -> Needs:
        """Plain gradients of the pool."""
        return Needs((PLAIN,), target="none")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows by the norm of their gradient; equal ones in pool order."""
        norms = problem.pool[PLAIN.label].columns["norm"].astype(float)
        return self.kept(norms.mean(axis=0) if self.at == "mean" else norms[0], k)
