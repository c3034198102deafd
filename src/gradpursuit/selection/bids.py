"""`bids`: influence on every target row on one scale, and the worst served target row served next."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradpursuit.gradients.preconditioner import PreconditionerLabel
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.scores import InfluenceSection


class BIDS(InfluenceSection):
    """Balanced selection by influence (arXiv 2501.12147).

    Every column of the influence matrix (pool × target rows, as LESS computes it) is brought to mean 0 and standard
    deviation 1. Then, one after the other, the row is chosen that on some target row exceeds the mean of those chosen
    so far by most. The paper leaves open what is exceeded at the first step: here 0, the mean of the pool.
    """

    source: ClassVar[str] = "Dai, Zhang, Ma, Peng, arXiv 2501.12147"
    stochastic: ClassVar[bool] = False

    preconditioner: PreconditionerLabel | None = Field(
        "adam-uncorrected", description="of the gradients; null: that of section gradients"
    )

    def needs(self, settings: Settings) -> Needs:
        """Gradients of its own kind, of single target rows."""
        return Needs((self.kind(settings),))

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows in the order in which they are chosen; equal ones in pool order."""
        scores = problem.once(("bids", self), lambda: standardized(self.on_rows(problem)))
        return Selection.ranked(serve_worst(scores, k))


def standardized(influence: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns of [N, M] with mean 0 and standard deviation 1; constant ones are 0."""
    centred = influence - influence.mean(axis=0)
    deviation = centred.std(axis=0)
    return np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)


def serve_worst(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The `k` rows of [N, M] that are chosen one after the other, each for the largest gain on a single column."""
    free = np.ones(len(scores), dtype=bool)
    chosen, total = np.empty(k, dtype=np.int64), np.zeros(scores.shape[1])
    for number in range(k):
        gain = (scores - total / max(number, 1)).max(axis=1)
        chosen[number] = np.argmax(np.where(free, gain, -np.inf))
        free[chosen[number]] = False
        total += scores[chosen[number]]
    return chosen
