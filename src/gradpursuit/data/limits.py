"""What a model can take of a row: which tokens, and how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one model; None: there is no limit, or it is not known.

    Attributes:
        vocabulary: tokens that have an embedding: ids are below it.
        positions: positions that the model has a place for (learned or stored ones).
        longest: tokens of the longest row that fits, padded, into the positions.
    """

    vocabulary: int | None = None
    positions: int | None = None
    longest: int | None = None

    def beyond(self, ids: Sequence[int]) -> int | None:
        """The first token id that the model has no embedding for; None: it has one for each."""
        if self.vocabulary is None or not ids or (max(ids) < self.vocabulary and min(ids) >= 0):
            return None
        return next(token for token in ids if not 0 <= token < self.vocabulary)

    def too_long(self, tokens: int) -> str:
        """Why a row of so many tokens does not fit; empty: it does."""
        if self.longest is None or tokens <= self.longest:
            return ""
        return f"longer than the model's {self.positions} positions"
