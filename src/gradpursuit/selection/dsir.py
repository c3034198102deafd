"""`dsir`: text that is distributed like the target's, by importance resampling on hashed words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import regex
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gradpursuit.config import Number, Section, Whole
from gradpursuit.data.words import fold, words
from gradpursuit.errors import SelectionError
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.clusters import interleaved, proportional_shares

Array = NDArray[np.float64]
_RUN = regex.compile(r"[\w\p{M}]+|[^\w\s\p{M}]+")
_OFFSET = 1e-8  # added to the authors' probabilities before the logarithm


class DSIR(Section):
    """Data selection with importance resampling (arXiv 2302.03169; authors' code: p-lambda/dsir).

    A row's features are the counts of its words and pairs of words in hash buckets. Two bags are fitted: p to the
    target, q to the pool. The log importance weight of a row is the sum over its counts of log p - log q, not divided
    by its length. k rows are drawn without replacement in proportion to the weights: those with the highest weight plus
    Gumbel noise.

    A target of a few dozen rows leaves most buckets empty, so what an unseen word costs decides the choice. Three ways:

    * `prior` μ: p_b = (c_b + μ q_b) / (c + μ), c being the counts of the target. An unseen word always counts against
      a row; μ does not depend on the number of buckets or on the size of the pool.
    * `smoothing` s: s is added to every bucket of both bags. With s = 1, rare words of the pool look more like the
      target than the target's own words do once the pool is large.
    * `smoothing: paper`: nothing is added to the counts, 1e-8 to both probabilities.

    Differs from the authors' code:

    * The text is what the row says, without the chat template, which all rows share.
    * A run of punctuation is a word, as theirs, but a run of letters is what :func:`gradpursuit.data.words.words` makes
      of it: in scripts without spaces one word per character, where theirs is a whole sentence.
    * The hash is MurmurHash3, not SHA-256.
    * Rows of less than 100 words are kept: rows for fine-tuning are short.
    * `per_group`: shares of the target groups are in proportion to their counts, as the authors' are by default; the
      groups draw one after the other, each from the rows that are left.
    """

    source: ClassVar[str] = "Xie, Santurkar, Ma, Liang, arXiv 2302.03169"

    buckets: Whole = Field(10_000, ge=1, le=2**24, description="hash buckets of the word counts")
    smoothing: Literal["paper"] | Number | None = Field(
        None, description="a number above 0: added to every bucket of both bags; paper: as the authors; null: the prior"
    )
    prior: Number | None = Field(
        1000.0, gt=0, description="how many counts of the pool's words the target's bag starts from; null: smoothing"
    )
    per_group: bool = Field(False, description="a bag and a share of the rows for every target group, not one for all")
    noise: bool = Field(True, description="draw in proportion to the weights; false: take the highest ones")

    @model_validator(mode="before")
    @classmethod
    def _one_way(cls, given: Any) -> Any:
        """With `smoothing` alone there is no prior."""
        if isinstance(given, dict) and given.get("smoothing") is not None and "prior" not in given:
            return {**given, "prior": None}
        return given

    @model_validator(mode="after")
    def _ways(self) -> DSIR:
        if not isinstance(self.smoothing, str) and self.smoothing is not None and self.smoothing <= 0:
            raise ValueError("smoothing: must be above 0, 'paper' or null")
        if (self.smoothing is None) == (self.prior is None):
            raise ValueError("give either smoothing or prior, and leave the other out")
        return self

    @property
    def stochastic(self) -> bool:
        """Whether the choice depends on the seed."""
        return self.noise

    def needs(self, settings: Settings) -> Needs:
        """Text of pool and target."""
        return Needs(text=True)

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows, drawn again for every seed, the one that was drawn first leading.

        Raises:
            SelectionError: the problem has no text, or a target group has no words.
        """
        weights, counts = problem.once(("dsir", self), lambda: self._log_weights(problem))
        rng, left = np.random.default_rng(seed), np.ones(weights.shape[1], dtype=bool)
        shares = proportional_shares(counts, min(k, len(left)))
        drawn = []
        for group, share in enumerate(shares.tolist()):
            keys = weights[group] + (rng.gumbel(size=len(left)) if self.noise else 0)
            chosen = np.argsort(np.where(left, -keys, np.inf), kind="stable")[:share]
            left[chosen] = False
            drawn.append(chosen)
        rows, groups = interleaved(drawn)
        evidence: dict[str, Any] = {"log_weights": weights[groups, rows].tolist()}
        if self.per_group:
            evidence["group"] = groups.tolist()
        return Selection.ranked(rows, evidence)

    def _log_weights(self, problem: SelectionProblem) -> tuple[Array, NDArray[np.int64]]:
        """Log weights [q, N] for q bags of the target, and the counts [q] of each."""
        if problem.text is None:
            raise SelectionError("dsir: the text of the rows is not at hand; give the problem a `text` function")
        pool, target = (self._counts(list(map(problem.text, rows))) for rows in (problem.rows, problem.target_rows))
        groups = problem.groups if self.per_group else np.zeros(target.shape[0], dtype=np.int64)
        bags = [_bag(target[groups == group]) for group in range(int(groups.max(initial=0)) + 1)]
        if any(not bag.any() for bag in bags):
            raise SelectionError("dsir: the target has no words; give it rows with text, or leave dsir out")
        ratios = np.array([self._log_ratio(bag, _bag(pool)) for bag in bags])
        return np.asarray((pool @ ratios.T).T), np.array([bag.sum() for bag in bags]).astype(np.int64)

    def _counts(self, texts: Sequence[str]) -> Any:
        """Sparse counts [len(texts), buckets] of words and pairs of words."""
        from sklearn.feature_extraction.text import HashingVectorizer

        hashing = HashingVectorizer(n_features=self.buckets, analyzer=_grams, alternate_sign=False, norm=None)
        return hashing.transform(texts)

    def _log_ratio(self, target: Array, pool: Array) -> Array:
        """log p - log q of every bucket [buckets], from the counts of the target's and the pool's words."""
        if self.prior is not None:
            q = pool / pool.sum() if pool.any() else np.full(len(pool), 1 / len(pool))
            p = (target + self.prior * q) / (target.sum() + self.prior)
            return np.log(np.divide(p, q, out=np.ones_like(p), where=q > 0))
        offset, added = (_OFFSET, 0.0) if self.smoothing == "paper" else (0.0, float(self.smoothing or 0))
        p, q = ((bag + added) / max((bag + added).sum(), 1) for bag in (target, pool))
        return np.asarray(np.log(p + offset) - np.log(q + offset))


def _bag(counts: Any) -> Array:
    return np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()


def _grams(text: str) -> Iterator[str]:
    """Words and pairs of words."""
    found = tokens(text)
    yield from found
    yield from map(" ".join, pairwise(found))


def tokens(text: str) -> list[str]:
    """Words and runs of punctuation, in order.

    Punctuation counts: the form of a question tells tasks apart as much as its words do.
    """
    found: list[str] = []
    for run in _RUN.findall(fold(text)):
        found += [run] if run.isascii() else words(run) or [run]
    return found


def log_importance(pool: Sequence[str], target: Sequence[str], **options: Any) -> Array:
    """log p(z) - log q(z) of every pool text z [N], p fitted to the target, q to the pool.

    Options are those of :class:`DSIR`.
    """
    method = DSIR(**options)
    bags, counts = (method._counts(texts) for texts in (target, pool))
    return np.asarray(counts @ method._log_ratio(_bag(bags), _bag(counts)))
