"""`random-matched`: random rows that look from outside like those that another strategy chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gradpursuit.config import Section, Whole
from gradpursuit.data import Row
from gradpursuit.errors import ConfigError
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.registry import Strategy


class RandomMatched(Section):
    """As many rows of every source and length as another strategy chose, drawn at random from all such rows.

    It tells what a strategy finds from what source, length and format alone would do. The pool is cut into cells of
    equal source, equal bin of total length and equal bin of answer length (bins of equal numbers of rows, in
    tokens), and of each cell as many rows are drawn, without replacement, as the other strategy took of it; its own
    rows may be among them.
    """

    source: ClassVar[str] = "control of this package"
    stochastic: ClassVar[bool] = True

    like: str = Field("gtp", description="the strategy whose choice is matched")
    column: str | None = Field(None, description="column of the pool that names the source; null: the file")
    bins: Whole = Field(4, ge=1, le=1024, description="bins of total length, and of answer length")

    def needs(self, settings: Settings) -> Needs:
        """What the other strategy needs."""
        return self._other(settings).needs(settings)

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """As many rows as the other strategy chooses of `k`, in random order."""
        other = self._other(problem.settings)
        found = problem.once(("random-matched", self.like, k), lambda: other.select(problem, k, seed))
        cells = problem.once(("cells", self), lambda: self._cells(problem.rows))
        wanted = np.bincount(cells[found.indices], minlength=cells.max() + 1)
        rng = np.random.default_rng(seed)
        drawn = [rng.permutation(np.flatnonzero(cells == cell))[: wanted[cell]] for cell in np.flatnonzero(wanted)]
        return Selection.ranked(rng.permutation(np.concatenate(drawn)), {"like": self.like})

    def _other(self, settings: Settings) -> Strategy:
        other = settings.strategy(self.like)
        if isinstance(other.method, RandomMatched) or other.stochastic:
            raise ConfigError(
                f"random-matched: like = '{self.like}', whose choice is random itself; name a strategy that is not"
            )
        return other

    def _cells(self, rows: Sequence[Row]) -> NDArray[np.int64]:
        """The cell of every row, numbered from 0: int64 [N]."""
        sources = [row.source if self.column is None else str(self._named(row)) for row in rows]
        total = _binned([len(row.input_ids) for row in rows], self.bins)
        answer = _binned([sum(label >= 0 for label in row.labels) for row in rows], self.bins)
        keys = [f"{t}:{a}:{source}" for t, a, source in zip(total.tolist(), answer.tolist(), sources, strict=True)]
        return np.unique(keys, return_inverse=True)[1].astype(np.int64)

    def _named(self, row: Row) -> object:
        try:
            return row.columns[str(self.column)]
        except KeyError:
            raise ConfigError(
                f"random-matched: {row.where} has no column '{self.column}', which is to name the source; "
                f"it has {', '.join(row.columns)}"
            ) from None


def _binned(lengths: list[int], bins: int) -> NDArray[np.int64]:
    """The bin of every length, 0 … bins - 1, bounded by quantiles; equal lengths share a bin."""
    bounds = np.quantile(lengths, np.arange(1, bins) / bins)
    return np.searchsorted(bounds, lengths, side="right").astype(np.int64)
