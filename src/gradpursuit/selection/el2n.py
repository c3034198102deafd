"""`el2n`: the examples that the model predicts worst, or best."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from gradpursuit.gradients.forward import EL2N as ERRORS
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.scores import KeepSection


class EL2N(KeepSection):
    """EL2N (arXiv 2107.07075): ‖p − y‖₂ of the predicted distribution p and the true token y, early in training.

    For sequences the mean over supervised tokens (arXiv 2309.04564). The paper averages over ten runs; here it is the
    mean over the checkpoints of one warm-up.
    """

    source: ClassVar[str] = "Paul, Ganguli, Dziugaite, arXiv 2107.07075"
    stochastic: ClassVar[bool] = False

    at: Literal["mean", "first", "base"] = Field(
        "mean", description="of all checkpoints, of the first one, or of the model before any training"
    )

    def needs(self, settings: Settings) -> Needs:
        """Errors of the pool."""
        return Needs((ERRORS,), target="none")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows by their error; equal ones in pool order."""
        errors = problem.pool[ERRORS.label]
        points = {"base": [0], "first": [1], "mean": range(1, errors.checkpoints)}[self.at]
        scores = np.mean([errors.at(t)[:, 0] for t in points], axis=0)
        return self.kept(scores, k)
