"""`dsir`: text that is distributed like the target's, by importance resampling on hashed words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradpursuit.config import Number, Section, Whole
from gradpursuit.errors import SelectionError
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings


class DSIR(Section):
    """Data selection with importance resampling (arXiv 2302.03169).

    A row's features are the counts of its words and pairs of words (lower case; punctuation is a word) in hash buckets.
    Two bags of words are fitted, one to the target and one to the pool; the log importance weight of a row is the log
    of the ratio of what they give its counts. k rows are drawn without replacement in proportion to the weights: those
    with the highest weight plus Gumbel noise.

    Differs in the hash (MurmurHash3), and in that both bags are smoothed by adding `smoothing` to every bucket: a
    target of a few dozen rows leaves most buckets empty. The text is the whole rendered row, chat template included,
    which all rows share.
    """

    source: ClassVar[str] = "Xie, Santurkar, Ma, Liang, arXiv 2302.03169"
    stochastic: ClassVar[bool] = True

    buckets: Whole = Field(10_000, ge=1, description="hash buckets of the word counts")
    smoothing: Number = Field(1.0, gt=0, description="added to the counts of every bucket before the bags are fitted")

    def needs(self, settings: Settings) -> Needs:
        """Text of pool and target."""
        return Needs(text=True)

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows, drawn anew for every seed, the one that was drawn first leading."""
        weights = problem.once(("dsir", self), lambda: self._log_weights(problem))
        noise = np.random.default_rng(seed).gumbel(size=len(weights))
        chosen = np.argsort(-(weights + noise), kind="stable")[:k]
        return Selection.ranked(chosen, {"log_weights": weights[chosen].tolist()})

    def _log_weights(self, problem: SelectionProblem) -> NDArray[np.float64]:
        if problem.text is None:
            raise SelectionError("dsir: the text of the rows is not at hand; give the problem a `text` function")
        pool, target = (list(map(problem.text, rows)) for rows in (problem.rows, problem.target_rows))
        return log_importance(pool, target, self.buckets, self.smoothing)


def log_importance(
    pool: Sequence[str], target: Sequence[str], buckets: int, smoothing: float = 1.0
) -> NDArray[np.float64]:
    """log p(z) - log q(z) of every pool text z [N], p fitted to the target and q to the pool."""
    from sklearn.feature_extraction.text import HashingVectorizer

    hashing = HashingVectorizer(
        n_features=buckets,
        ngram_range=(1, 2),
        token_pattern=r"\w+|[^\w\s]+",
        alternate_sign=False,
        norm=None,
    )
    counts = hashing.transform(pool)
    bags = [np.asarray(part.sum(axis=0)).ravel() + smoothing for part in (hashing.transform(target), counts)]
    p, q = (bag / bag.sum() for bag in bags)
    weights: NDArray[np.float64] = counts @ (np.log(p) - np.log(q))
    return weights
