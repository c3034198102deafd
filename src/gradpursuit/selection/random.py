"""`random`: the baseline that every selector has to beat."""

from __future__ import annotations

import numpy as np

from gradpursuit.config import GradientsSection
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.selection.base import Selection, SelectionProblem


class Random:
    """Uniform, without replacement; a new draw for every evaluation seed."""

    name = "random"
    source = "uniform sampling"
    stochastic = True

    def needs(self, gradients: GradientsSection) -> list[Preconditioner]:
        """Nothing."""
        return []

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` pool rows in random order."""
        return Selection.ranked(np.random.default_rng(seed).permutation(len(problem.ids))[:k])
