"""Budgets: how many rows or tokens, and how many rows of each source; every one is met by one selection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction as Ratio
from math import floor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from gradpursuit.config import Fraction, Section, Whole, rows_of
from gradpursuit.data import IGNORE, Table
from gradpursuit.errors import SelectionError, nearest
from gradpursuit.selection.base import Selection
from gradpursuit.sources import short_names

EVERY = "*"  # in bounds: every source that is not named
KNEE_RULES = {"gain": "the smallest budget on the path that brings 95 % of what the first layer brings"}


def _bound(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("expected a count of rows, such as 50, or a share of the exported rows, such as 0.3")
    if value < 0 or (isinstance(value, float) and value > 1):
        raise ValueError("a count of rows is not negative, a share is from 0 to 1")
    return value


Bounds = dict[str, Annotated[int | float, BeforeValidator(_bound)]]


class BudgetRequest(Section):
    """What is asked for: at most one of k, fraction and tokens (none: the whole selection), and bounds for sources."""

    k: Annotated[Whole, Field(ge=1)] | Literal["auto"] | None = Field(
        None, description="rows; auto: the knee of the first strategy that keeps a path"
    )
    fraction: Fraction | None = Field(None, description="share of the cleaned pool, rounded up")
    tokens: Whole | None = Field(None, ge=1, description="as many rows, best first, as hold at most so many tokens")
    count: Literal["supervised", "total"] = Field("supervised", description="which tokens are counted")
    min_per_source: Bounds = Field(
        default_factory=dict, description=f"rows, or share of the exported rows, by source; '{EVERY}': all others"
    )
    max_per_source: Bounds = Field(default_factory=dict, description="likewise")

    @model_validator(mode="after")
    def _one_budget(self) -> BudgetRequest:
        given = [name for name in ("k", "fraction", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given together: give one of them")
        if self.count == "total" and self.tokens is None:
            raise ValueError("count (--count) says which tokens of a budget count: give tokens (--tokens N) too")
        shares = [value for bounds in (self.min_per_source, self.max_per_source) for value in bounds.values()]
        if any(isinstance(value, float) for value in shares) and given not in (["k"], ["fraction"]):
            raise ValueError("a share for a source is one of a number of rows: give k or fraction, or counts instead")
        return self


_LESS = "ask for less, or select more rows first (selection.k)"


@dataclass(frozen=True)
class Budget:
    """What an export may hold.

    Attributes:
        limit: of `unit`; None: the whole selection.
        unit: what is limited.
        least: rows of a source, at least.
        most: rows of a source, at most.
        knee: how the limit was found, if it is the knee of a path: strategy, budget, rule, relative_residual.
        names: of sources, as people read them.
    """

    limit: int | None
    unit: Literal["rows", "supervised tokens", "tokens"]
    least: Mapping[str, int]
    most: Mapping[str, int]
    knee: Mapping[str, Any] | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        limit = "the whole selection" if self.limit is None else f"{self.limit:,} {self.unit}"
        limit = limit if self.unit == "rows" or self.limit is None else f"at most {limit}"
        knee = self.knee and f", the knee of {self.knee['strategy']}: {KNEE_RULES[self.knee['rule']]}"
        bounds = [
            f"{word} {number:,} rows of {self.names.get(source, source)}"
            for word, numbers in (("at least", self.least), ("at most", self.most))
            for source, number in numbers.items()
        ]
        return "; ".join([limit + (knee or ""), *bounds])


def resolve(request: BudgetRequest, pool: Table, selections: Mapping[str, Selection]) -> Budget:
    """The budget that a request means for the selections of a pool, by strategy.

    Raises:
        SelectionError: a source is not one of the pool, its minimum is above its maximum, or no strategy has a knee.
    """
    limit, unit, knee = _limit(request, len(pool), selections)
    names = short_names(zip(pool.column("source"), pool.column("file"), strict=True))
    sources = list(names)
    rows = limit if unit == "rows" else None
    least = {name: rows_of(value, rows or 0) for name, value in _by_source(request.min_per_source, sources).items()}
    most = {
        name: value if isinstance(value, int) else floor(Ratio(str(value)) * (rows or 0))
        for name, value in _by_source(request.max_per_source, sources).items()
    }
    for name, number in least.items():
        if number > most.get(name, number):
            raise SelectionError(f"source '{name}' is to have at least {number} rows and at most {most[name]}")
    return Budget(limit, unit, {name: number for name, number in least.items() if number}, most, knee, names)


def _limit(request: BudgetRequest, rows: int, selections: Mapping[str, Selection]) -> Any:
    if request.tokens is not None:
        return request.tokens, "tokens" if request.count == "total" else "supervised tokens", None
    if request.fraction is not None:
        return rows_of(request.fraction, rows), "rows", None
    if request.k != "auto":
        return request.k, "rows", None
    for name, selection in selections.items():
        if knee := selection.evidence.get("knee"):
            return knee["budget"], "rows", {"strategy": name, **knee}
    raise SelectionError(
        f"k = auto takes the knee of a pursuit's path, which {', '.join(selections)} have not, as they rank "
        "rows one by one; name a number of rows, or select with gtp as well"
    )


def _by_source(bounds: Mapping[str, Any], sources: Sequence[str]) -> dict[str, Any]:
    """Bounds by the full names of sources; of a path the last parts suffice."""
    found = dict.fromkeys(sources, bounds[EVERY]) if EVERY in bounds else {}
    for name, value in bounds.items():
        if name == EVERY:
            continue
        parts = Path(name).parts
        meant = [source for source in sources if source == name or Path(source).parts[-len(parts) :] == parts]
        meant = [source for source in meant if source == name] or meant
        if len(meant) != 1:
            why = "no source of the pool has that name" if not meant else f"{len(meant)} sources have that name"
            raise SelectionError(f"source '{name}': {why}; {nearest(name, sources)}")
        found[meant[0]] = value
    return found


@dataclass(frozen=True)
class Facts:
    """What budgets go by, of the rows of a selection: by position in the pool, their sources, and what each costs."""

    source: Mapping[int, str]
    cost: Mapping[int, int]

    @classmethod
    def of(cls, indices: Iterable[int], pool: Table, unit: str) -> Facts:
        """Of the rows at `indices`; `unit` is what they cost: each one of "rows", or its tokens."""
        source, cost = {}, {}
        for index in sorted(indices):
            row = pool[index]
            supervised = sum(label != IGNORE for label in row.labels)
            source[index] = row.source
            cost[index] = {"rows": 1, "supervised tokens": supervised, "tokens": len(row.input_ids)}[unit]
        return cls(source, cost)


def within_budget(selection: Selection, budget: Budget, pool: Table) -> Selection:
    """The part of a selection that meets the budget, exactly.

    It is taken from the smallest subset on the path that can meet it, best rows first: as many as are asked for, or as
    hold at most so many tokens. Of sources with a minimum, the best rows are taken before others; rows of sources that
    have reached their maximum are passed over. The weights are those of that subset, of mean 1.

    Raises:
        SelectionError: no part of the selection meets it; what is lacking is told.
    """
    facts = Facts.of(selection.indices.tolist(), pool, budget.unit)
    subsets = [selection] if budget.limit is None else [*selection.path, selection]
    lacking = ""
    for subset in subsets:
        places, lacking = _filled(subset.indices.tolist(), budget, facts)
        if not lacking:
            weights = subset.weights[places]
            return Selection(
                subset.indices[places], weights / weights.mean(), subset.layers[places], selection.evidence
            )
    raise SelectionError(lacking)


def _filled(indices: list[int], budget: Budget, facts: Facts) -> tuple[list[int], str]:
    """Places among `indices` that fill the budget, ascending, and what is lacking for that."""
    source = [facts.source[index] for index in indices]
    cost = [facts.cost[index] for index in indices]
    limit = np.inf if budget.limit is None else budget.limit
    taken: set[int] = set()
    for name, least in budget.least.items():
        own = [place for place, other in enumerate(source) if other == name][:least]
        if len(own) < least:
            return (
                [],
                f"source '{name}' is to have {least} rows or more, but the selection holds only {len(own)}; {_LESS}",
            )
        taken.update(own)
    used = sum(cost[place] for place in taken)
    if used > limit:
        return [], f"the least rows of the sources take {used:,} {budget.unit}: raise the budget of {limit:,}"
    counts, full = Counter(source[place] for place in taken), False
    for place in range(len(indices)):
        if place in taken or counts[source[place]] >= budget.most.get(source[place], len(indices)):
            continue
        full = used + cost[place] > limit
        if full:
            break
        taken.add(place)
        counts[source[place]] += 1
        used += cost[place]
    if not taken:
        why = f"its best row alone has {cost[0]:,} {budget.unit}" if full else "the sources' maxima leave none of it"
        why += "; raise it" if full else "; raise them"
        return [], f"the budget ({budget}) buys no row of the selection: {why}"
    if budget.limit is not None and not full and used < limit:
        within = " within the sources' maxima" if budget.most else ""
        return [], f"the budget is {limit:,} {budget.unit}, but the selection holds only {used:,}{within}; {_LESS}"
    return sorted(taken), ""
