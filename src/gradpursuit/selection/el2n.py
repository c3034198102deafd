"""`el2n`: the examples that the model predicts worst, or best."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from gradpursuit.config import Number
from gradpursuit.gradients.forward import EL2N as ERRORS
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.scores import TRIM, KeepSection


class EL2N(KeepSection):
    """EL2N (arXiv 2107.07075): ‖p − y‖₂ of the predicted distribution p and the true token y, early in training.

    For sequences the mean over supervised tokens (arXiv 2309.04564). The paper averages over ten runs of a vision
    model; here it is one warm-up, and its last checkpoint: for language, scores from the first steps choose worse than
    random rows, and about an epoch is needed (arXiv 2211.05610). The rows with the highest scores are often noise, so
    `trim` leaves out 5 %. Even then the hardest rows are known to be no better than random ones where less than about
    60 % of the pool is kept, and budgets here are mostly 5 % or less: take it as a baseline.
    """

    source: ClassVar[str] = "Paul, Ganguli, Dziugaite, arXiv 2107.07075"
    stochastic: ClassVar[bool] = False

    at: Literal["last", "mean", "first", "base"] = Field(
        "last", description="of the last checkpoint, of all, of the first one, or of the model before any training"
    )
    trim: Literal["2sd"] | Number | None = Field(0.05, description=TRIM)

    def needs(self, settings: Settings) -> Needs:
        """Errors of the pool."""
        return Needs((ERRORS,), target="none")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows by their error; equal ones in pool order."""
        errors = problem.pool[ERRORS.label]
        points = {"base": [0], "first": [1], "mean": range(1, errors.checkpoints), "last": [-1]}[self.at]
        scores = np.mean([errors.at(t)[:, 0] for t in points], axis=0)
        return self.kept(scores, k)
