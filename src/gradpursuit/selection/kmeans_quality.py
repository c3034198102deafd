"""`kmeans-quality`: something of every cluster of the pool, the better rows more likely."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradpursuit.config import Section, Whole
from gradpursuit.gradients.forward import EMBEDDING
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings


class KMeansQuality(Section):
    """kMQ (arXiv 2409.11378): k-means on embeddings, budgets by the clusters' sizes, sampling by quality inside.

    Embeddings are the base model's own, brought to unit length; quality is one over the perplexity that the base model
    gives the answer (the authors also use a reward model and a judge, which are better and are other models). Rows are
    drawn without replacement, with probabilities in proportion to quality within each cluster.
    """

    source: ClassVar[str] = "Yu, Chen, Ahmadian, Fadaee, arXiv 2409.11378 (kMQ)"
    stochastic: ClassVar[bool] = True

    clusters: Whole | None = Field(None, ge=1, description="null: the square root of the number of pool rows")
    quality: Literal["perplexity", "none"] = Field(
        "perplexity", description="one over the base model's perplexity, or the same for all (k-means-random)"
    )

    def needs(self, settings: Settings) -> Needs:
        """Embeddings of the pool, and the losses that come with them."""
        return Needs((EMBEDDING,), target="none")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows, drawn anew for every seed, in random order."""
        pool = problem.pool[EMBEDDING.label]
        labels = problem.once(("clusters", self, seed), lambda: self._clusters(pool.at(0), seed))
        log_quality = -pool.columns["loss"][0].astype(np.float64)
        rng = np.random.default_rng(seed)
        draw = rng.gumbel(size=len(labels)) + (log_quality if self.quality == "perplexity" else 0)
        sizes = np.bincount(labels)
        order = np.argsort(-draw, kind="stable")
        chosen = [
            order[labels[order] == cluster][:share]
            for cluster, share in enumerate(proportional_shares(sizes, k).tolist())
        ]
        found = rng.permutation(np.concatenate(chosen))
        return Selection.ranked(found, {"clusters": int((sizes > 0).sum()), "cluster": labels[found].tolist()})

    def _clusters(self, embeddings: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
        from sklearn.cluster import KMeans

        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        wanted = self.clusters or round(len(unit) ** 0.5)
        count = min(wanted, len(np.unique(unit, axis=0)))
        labels: NDArray[np.int64] = KMeans(count, n_init=1, random_state=seed).fit(unit).labels_.astype(np.int64)
        return labels


def proportional_shares(sizes: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """k shared out in proportion to `sizes` [c], none above its size: largest remainders, ties in order."""
    exact = k * sizes / sizes.sum()
    shares = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - shares), kind="stable")[: k - shares.sum()]
    shares[largest] += 1
    return shares
