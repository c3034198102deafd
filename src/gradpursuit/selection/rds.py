"""`rds`: the nearest neighbours of every target row in the model's own hidden states."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.scores import InfluenceSection


class RDS(InfluenceSection):
    """RDS+ (arXiv 2503.01807): target rows take turns, each taking its most similar pool row that is still free.

    Similarity is the cosine of embeddings: the mean of the base model's last hidden states over all tokens of a row,
    prompt and answer, the token at position i weighted by i.
    """

    source: ClassVar[str] = "Ivison et al., arXiv 2503.01807 (RDS+)"
    stochastic: ClassVar[bool] = False

    features: Literal["gradient", "embedding"] = Field(
        "embedding", description="embeddings of the base model, or gradients along the trajectory"
    )

    def needs(self, settings: Settings) -> Needs:
        """Embeddings of pool and single target rows."""
        return Needs((self.kind(settings),))

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows in the order in which they are taken; equally similar ones in pool order."""
        similar = problem.once(("rds", self), lambda: self.on_rows(problem))
        chosen = round_robin(similar, k)
        return Selection.ranked(chosen, {"scores": similar[chosen].max(axis=1).tolist()})


def round_robin(scores: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """The `k` rows of [N, M] that the columns take in turn, each its best free one."""
    preferred = np.argsort(-scores, axis=0, kind="stable")
    places, taken = np.zeros(scores.shape[1], dtype=np.int64), np.zeros(len(scores), dtype=bool)
    chosen = np.empty(k, dtype=np.int64)
    for number in range(k):
        column = number % scores.shape[1]
        while taken[preferred[places[column], column]]:
            places[column] += 1
        chosen[number] = preferred[places[column], column]
        taken[chosen[number]] = True
    return chosen
