"""`grand`: the examples with the largest, or the smallest, gradients."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from gradpursuit.config import Number
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.scores import TRIM, KeepSection

PLAIN = Preconditioner("identity")


class GraNd(KeepSection):
    """GraNd (arXiv 2107.07075): the norm of an example's gradient (before the sketch), early in training.

    The paper averages over ten runs of a vision model; here it is one warm-up, and its last checkpoint. What
    :class:`~gradpursuit.selection.el2n.EL2N` says of early scores, of noise among the highest and of small budgets
    (arXiv 2211.05610) holds here too. Of losses that are means over tokens, short ones have larger gradients.
    """

    source: ClassVar[str] = "Paul, Ganguli, Dziugaite, arXiv 2107.07075"
    stochastic: ClassVar[bool] = False

    at: Literal["last", "mean", "first"] = Field(
        "last", description="of the last checkpoint, the mean of all, or of the first one"
    )
    trim: Literal["2sd"] | Number | None = Field(0.05, description=TRIM)

    def needs(self, settings: Settings) -> Needs:
        """Plain gradients of the pool."""
        return Needs((PLAIN,), target="none")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows by the norm of their gradient; equal ones in pool order."""
        norms = problem.pool[PLAIN.label].columns["norm"].astype(float)
        return self.kept({"last": norms[-1], "first": norms[0], "mean": norms.mean(axis=0)}[self.at], k)
