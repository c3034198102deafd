"""`random`: the baseline that every selector has to beat."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from gradpursuit.config import Section
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings


class Random(Section):
    """Uniform, without replacement; a new draw for every evaluation seed."""

    source: ClassVar[str] = "uniform sampling"
    stochastic: ClassVar[bool] = True

    def needs(self, settings: Settings) -> Needs:
        """Nothing."""
        return Needs(target="none")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` pool rows in random order."""
        return Selection.ranked(np.random.default_rng(seed).permutation(len(problem.ids))[:k])
