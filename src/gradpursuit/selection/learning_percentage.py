"""`learning-percentage`: the examples that are learnt late."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from gradpursuit.gradients.forward import EL2N as ERRORS
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.scores import KeepSection


class LearningPercentage(KeepSection):
    """Learning percentage (arXiv 2402.10430): how much of an example's perplexity falls at the beginning of training.

    LP = (P₀ − P₁) / (P₀ − P_T) with the perplexities at the base model, the first and the last checkpoint; or, the
    paper's LP_app, divided by P₀. The hardest have the lowest LP. Of a row whose perplexity does not fall in the whole
    run LP says nothing; it counts as harder than all others. In the paper the model trains on the whole pool and P₁ is
    after one epoch; here it trains on the warm-up's share, so most rows are learnt from others, and P₁ is where the
    first checkpoint is.
    """

    source: ClassVar[str] = "Mekala, Nguyen, Shang, arXiv 2402.10430"
    stochastic: ClassVar[bool] = False

    of: Literal["total", "start"] = Field(
        "total", description="share of the fall over the whole run, or of the perplexity at its start (LP_app)"
    )

    def needs(self, settings: Settings) -> Needs:
        """Losses of the pool before training and along it."""
        return Needs((ERRORS,), target="none")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows, the lowest learning percentage being the hardest; equal ones in pool order."""
        losses = problem.pool[ERRORS.label].columns["loss"].astype(np.float64)
        first, whole = (-np.expm1(np.minimum(losses[t] - losses[0], 50)) for t in (1, -1))  # 1 - P_t / P_0
        percentage = first if self.of == "start" else _share(first, whole)
        found = self.kept(-percentage, k)
        return Selection.ranked(found.indices, {"learning_percentage": percentage[found.indices].tolist()})


def _share(first: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """first / whole where the whole is positive, and elsewhere less than any of these."""
    falls = whole > 0
    share = np.divide(first, whole, out=np.zeros_like(first), where=falls)
    return np.where(falls, share, share.min() - 1)
