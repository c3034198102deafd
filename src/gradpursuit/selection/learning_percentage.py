"""`learning-percentage`: the examples that are learnt late."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradpursuit.config import Whole
from gradpursuit.gradients.forward import EL2N as ERRORS
from gradpursuit.gradients.forward import EMBEDDING
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.clusters import cluster_labels, interleaved, proportional_shares
from gradpursuit.selection.scores import Array, KeepSection


class LearningPercentage(KeepSection):
    """Learning percentage (arXiv 2402.10430): how much of an example's perplexity falls at the beginning of training.

    LP = (P₀ − P₁) / (P₀ − P_T) with the perplexities at the base model, the first and the last checkpoint; or, the
    paper's LP_app, divided by P₀. The hardest have the lowest LP. A row whose perplexity does not fall in the whole
    run counts as harder than all others; the authors' code lets the signs decide. In the paper the model trains on the
    whole pool and P₁ is after one epoch; here it trains on the warm-up's share, so most rows are learnt from others,
    and P₁ is where the first checkpoint is. The paper also lets a smaller model score for a larger one.

    The authors choose inside clusters (k-means, 1,000 of 52,000 rows, on a sentence model's embeddings), so that the
    rows do not come from one corner of the pool. `clusters` does so, on the base model's embeddings: each cluster gives
    rows in proportion to its size (largest remainders, where the authors round up).
    """

    source: ClassVar[str] = "Mekala, Nguyen, Shang, arXiv 2402.10430"
    stochastic: ClassVar[bool] = False

    of: Literal["total", "start"] = Field(
        "total", description="share of the fall over the whole run, or of the perplexity at its start (LP_app)"
    )

    clusters: Whole | None = Field(
        None,
        ge=1,
        le=2**20,
        description="choose inside so many clusters of the pool, as the authors do; null: among all rows",
    )

    def needs(self, settings: Settings) -> Needs:
        """Losses of the pool before training and along it; embeddings for the clusters."""
        return Needs((ERRORS, EMBEDDING) if self.clusters else (ERRORS,), target="none")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows, the lowest learning percentage being the hardest; equal ones in pool order."""
        losses = problem.pool[ERRORS.label].columns["loss"].astype(np.float64)
        first, whole = (-np.expm1(np.minimum(losses[t] - losses[0], 50)) for t in (1, -1))  # 1 - P_t / P_0
        percentage = first if self.of == "start" else _share(first, whole)
        if not self.clusters:
            found = self.kept(-percentage, k)
            return Selection.ranked(found.indices, {"learning_percentage": percentage[found.indices].tolist()})
        labels = problem.once(("clusters", self.clusters, 0), lambda: self._labels(problem))
        rows, _ = interleaved(self._inside(-percentage, labels, k))
        evidence = {"learning_percentage": percentage[rows].tolist(), "cluster": labels[rows].tolist()}
        return Selection.ranked(rows, evidence)

    def _labels(self, problem: SelectionProblem) -> NDArray[np.int64]:
        assert self.clusters is not None
        return cluster_labels(problem.pool[EMBEDDING.label].at(0), self.clusters, 0)

    def _inside(self, scores: Array, labels: NDArray[np.int64], k: int) -> list[NDArray[np.int64]]:
        """The rows that every cluster gives, in their order."""
        order = self.ordered(scores)
        shares = proportional_shares(np.bincount(labels[order]), min(k, len(order)))
        if self.keep != "band":
            return [order[labels[order] == cluster][:share] for cluster, share in enumerate(shares.tolist())]
        members = [np.sort(order[labels[order] == cluster]) for cluster in range(len(shares))]
        untrimmed = self.model_copy(update={"trim": None})  # the band of each cluster lies around its own quantile
        return [
            own[untrimmed.ordered(scores[own])][:share] for own, share in zip(members, shares.tolist(), strict=True)
        ]


def _share(first: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """first / whole where the whole is positive, and elsewhere less than any of these."""
    falls = whole > 0
    share = np.divide(first, whole, out=np.zeros_like(first), where=falls)
    return np.where(falls, share, share.min() - 1)
