"""`kmeans-quality`: something of every cluster of the pool, the better rows more likely."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from gradpursuit.config import Section, Whole
from gradpursuit.gradients.forward import EMBEDDING
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.clusters import cluster_labels, proportional_shares


class KMeansQuality(Section):
    """kMQ (arXiv 2409.11378): k-means on embeddings, budgets by the clusters' sizes, sampling by quality inside.

    This is the paper's static form. It differs from the paper and the authors' code
    (for-ai/iterative-data-selection):

    * Budgets of clusters are in proportion to their sizes, as in the paper's §2, by largest remainders. The code
      gives every cluster the same number of rows, and loses what small clusters do not have.
    * Rows are drawn without replacement, in proportion to quality within a cluster, as in the code; Eq. 3
      draws with it.
    * Quality is one over the perplexity that the base model gives the answer. The authors' Deita scores, reward models
      and judges are better, and are other models.
    * Embeddings are the base model's own, of prompt and answer, at unit length; one start of k-means.
    * `clusters` is the square root of the number of rows; the authors use 512 to 4,096.
    * The iterative form (§2: new budgets after every round, by what the model has learnt) is not here.
    """

    source: ClassVar[str] = "Yu, Chen, Ahmadian, Fadaee, arXiv 2409.11378 (kMQ)"
    stochastic: ClassVar[bool] = True

    clusters: Whole | None = Field(None, ge=1, le=2**20, description="null: the square root of the number of pool rows")
    quality: Literal["perplexity", "none"] = Field(
        "perplexity", description="one over the base model's perplexity, or the same for all (k-means-random)"
    )

    def needs(self, settings: Settings) -> Needs:
        """Embeddings of the pool, and the losses that come with them."""
        return Needs((EMBEDDING,), target="none")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows, drawn anew for every seed, in random order."""
        pool = problem.pool[EMBEDDING.label]
        count = self.clusters or round(len(problem.ids) ** 0.5)
        labels = problem.once(("clusters", count, seed), lambda: cluster_labels(pool.at(0), count, seed))
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
