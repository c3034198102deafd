"""`less`: the k examples of largest gradient influence, each scored on its own."""

from __future__ import annotations

import numpy as np

from gradpursuit.config import GradientsSection
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.selection.base import Selection, SelectionProblem

ADAM = Preconditioner("adam", bias_correction=False)


class LESS:
    """Σ_t η̄_t cos(U_t[i], mean of the unit target gradients), the maximum over target groups, then top-k.

    Adam features without bias correction for the pool, plain gradients for the target (arXiv 2402.04333).
    """

    name = "less"
    source = "Xia et al., arXiv 2402.04333"
    stochastic = False

    def needs(self, gradients: GradientsSection) -> list[Preconditioner]:
        """Adam without bias correction, whatever the pursuit uses."""
        return [ADAM]

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """The `k` highest scores; equal scores in pool order."""
        scores = influence(problem).max(axis=1)
        chosen = np.argsort(-scores, kind="stable")[:k]
        return Selection.ranked(chosen, {"scores": scores[chosen].tolist()})


def influence(problem: SelectionProblem) -> np.ndarray:
    """LESS's influence of every pool row on every target group: float64 [N, q]."""
    pool, target = problem.pool[ADAM.label], problem.target[ADAM.for_target.label]
    norms = pool.norms()
    groups = np.unique(problem.groups)
    shares = problem.rates / problem.rates.sum()
    scores = np.zeros((len(problem.ids), len(groups)))
    for t, share in enumerate(shares):
        rows = target.at(t)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        means = np.stack([rows[problem.groups == group].mean(axis=0) for group in groups], axis=1)  # [d, q]
        scores += share * pool.dot(t, means) / norms[t][:, None]
    return scores
