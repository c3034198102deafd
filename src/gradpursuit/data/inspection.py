"""What the data stage makes of the sources: rows as the model sees them, lengths, drops, copies, leaks."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from gradpursuit.config import DataSection
from gradpursuit.data.prepare import EXACT, FOLDED, prepare
from gradpursuit.data.render import IGNORE, Renderer
from gradpursuit.data.table import Row, Table

SPLITS = ("pool", "target", "heldout")
_LISTED = 10  # leaks and clusters that are named


@dataclass(frozen=True)
class Shown:
    """One row: `segments` are its text in order, each with whether it is supervised."""

    split: str
    id: str
    source: str
    file: str
    line: int
    tokens: int
    supervised: int
    segments: list[tuple[bool, str]]


@dataclass(frozen=True)
class Drop:
    """Rows of a split that were dropped for one reason; `first` is the place of one."""

    split: str
    reason: str
    rows: int
    first: str


@dataclass(frozen=True)
class Inspection:
    """What the data stage makes of the sources.

    Attributes:
        turns: the mode of supervision.
        masks: how the supervised tokens are found.
        rows: kept, by split.
        sources: rows of every schema that was recognised, dropped ones included, by split and source.
        notes: what the rows hold that is not read: rows of every note, by split.
        tokens: minimum, median, 95th percentile, maximum and total of the rows' lengths, by split.
        supervised: the same of the supervised tokens alone.
        dropped: by split and reason.
        deduplicate: what is done with copies.
        distinct: texts of the pool that stay and are different up to case and white space.
        copies: rows of the pool that are copies of earlier ones; which ones count: :attr:`copies_are`.
        copies_are: "exact copies", or "copies up to case and white space", which `folded`, `near` and `none` count.
        clusters: the largest groups of copies that were removed: id of the row that stays, and number of its copies.
        leaks: some of the pool rows that hold target text: id, place, the id of the row that they leak, and of a part
            the share of that text (`coverage`).
        leaks_kept: how many such rows stay in the pool.
        shown: some rows of pool and target.
    """

    turns: str
    masks: str
    rows: dict[str, int]
    sources: dict[str, dict[str, dict[str, int]]]
    notes: dict[str, dict[str, int]]
    tokens: dict[str, dict[str, int]]
    supervised: dict[str, dict[str, int]]
    dropped: list[Drop]
    deduplicate: str
    distinct: int
    copies: int
    copies_are: str
    clusters: list[dict[str, Any]]
    leaks: list[dict[str, Any]]
    leaks_kept: int
    shown: list[Shown]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def inspect(
    config: DataSection,
    renderer: Renderer,
    number: int,
    holdout: float,
    seed: int,
    check: Callable[[Table], None] = lambda pool: None,
) -> Inspection:
    """Read, render and clean everything, and look at it; nothing is left behind.

    Args:
        config: the sources, and what is dropped.
        renderer: of the model.
        number: rows of pool and target each that are shown, spread evenly.
        holdout: share of the target that is set aside without a held-out source.
        seed: of that share.
        check: raises what else is wrong with the cleaned pool.

    Raises:
        DataError: as :func:`prepare`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "data"
        counts = prepare(config, renderer, folder, holdout, seed)
        records = _Records(folder / "dropped.jsonl")
        tables = {name: Table.read(folder / f"{name}.parquet") for name in SPLITS}
        check(tables["pool"])
        lengths = {name: _lengths(table) for name, table in tables.items()}
        shown = [_shown(name, row, renderer) for name in SPLITS[:2] for row in _spread(tables[name], number)]
        removed = sum(counts["dropped"].get(f"pool: {reason}", 0) for reason in (EXACT, FOLDED))
        return Inspection(
            turns=config.turns,
            masks=counts["masks"],
            rows={name: counts["rows"][name] for name in SPLITS},
            sources=counts["schemas"],
            notes=counts["notes"],
            tokens={name: _figures(tokens) for name, (tokens, _) in lengths.items()},
            supervised={name: _figures(supervised) for name, (_, supervised) in lengths.items()},
            dropped=[Drop(*key, rows, records.first[key]) for key, rows in records.reasons.items()],
            deduplicate=config.deduplicate,
            distinct=counts["distinct"],
            copies=len(tables["pool"]) - counts["distinct"] if config.deduplicate == "none" else removed,
            copies_are="exact copies" if config.deduplicate == "exact" else "copies up to case and white space",
            clusters=[{"id": name, "copies": copies} for name, copies in records.clusters.most_common(_LISTED)],
            leaks=records.leaks,
            leaks_kept=counts["leaks_kept"],
            shown=shown,
        )


class _Records:
    """What `dropped.jsonl` says, counted."""

    def __init__(self, path: Path) -> None:
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.first: dict[tuple[str, str], str] = {}
        self.clusters: Counter[str] = Counter()
        self.leaks: list[dict[str, Any]] = []
        with path.open(encoding="utf-8") as file:
            for record in map(json.loads, file):
                self._count(record)

    def _count(self, record: Mapping[str, Any]) -> None:
        key, place = (record["split"], record["reason"]), f"{record['file']}:{record['line']}"
        self.reasons[key] += 1
        self.first.setdefault(key, place)
        if "duplicate_of" in record:
            self.clusters[record["duplicate_of"]] += 1
        if "leaks" in record and len(self.leaks) < _LISTED:
            part = {"coverage": record["coverage"]} if "coverage" in record else {}
            self.leaks.append({"id": record["id"], "place": place, "leaks": record["leaks"], **part})


def _lengths(table: Table) -> tuple[list[int], list[int]]:
    """Tokens, and supervised tokens, of every row."""
    pairs = [(len(row.input_ids), _supervised(row)) for row in table]
    return [tokens for tokens, _ in pairs], [supervised for _, supervised in pairs]


def _supervised(row: Row) -> int:
    return len(row.labels[1:]) - row.labels[1:].count(IGNORE)


def _figures(values: Sequence[int]) -> dict[str, int]:
    ranks = {"min": 0, "median": 50, "95 %": 95, "max": 100}
    found = np.percentile(values or [0], list(ranks.values()), method="nearest")
    return {**{name: int(value) for name, value in zip(ranks, found, strict=True)}, "total": int(np.sum(values))}


def _spread(table: Table, number: int) -> Sequence[Row]:
    places = np.unique(np.linspace(0, len(table) - 1, min(number, len(table))).round().astype(int))
    return list(table.take(places.tolist()))


def _shown(split: str, row: Row, renderer: Renderer) -> Shown:
    pairs = zip((label != IGNORE for label in row.labels), row.input_ids, strict=True)
    segments = [
        (supervised, renderer.decode([token for _, token in run]))
        for supervised, run in groupby(pairs, key=lambda pair: pair[0])
    ]
    return Shown(split, row.id, row.source, row.file, row.line, len(row.input_ids), _supervised(row), segments)
