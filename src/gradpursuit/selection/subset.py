"""The files of a subset that trainers read: its rows as they were, with weights, and whole rows repeated instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gradpursuit.data import IGNORE, Row, Table
from gradpursuit.data.json_text import as_json
from gradpursuit.errors import SelectionError
from gradpursuit.files import write_atomic, write_folder
from gradpursuit.selection.base import Selection
from gradpursuit.sources import short_names

RESERVED = ("weight", "rank", "layer", "repeats")
GIVING_WAY = ("source", "duplicate_of")  # columns that many pools have themselves, which then stay as they are
FOLDER = "dataset"
_DEPTH = 30  # levels of a column; Parquet's own limit is about a hundred, and a list has three of its levels
REPEATS = 4  # rows of the repeats file for each that was chosen, unless said otherwise
_OWN_TYPES = {"weight": pa.float64(), "rank": pa.int64(), "layer": pa.int64()}


@dataclass(frozen=True)
class Subset:
    """Chosen rows, in pool order, and what is to be told of each.

    Attributes:
        rows: of the pool.
        weights: float64 [k], mean 1.
        ranks: int64 [k], from 1, the best.
        layers: int64 [k], from 1.
        sources: of each row, the name of its source (:func:`~gradpursuit.sources.short_names`).
        duplicate_of: of each row, the id of an earlier row of the pool with the same text up to case and white
            space, or None.
        left_out: columns that are not added, as rows of the pool have columns of that name themselves.
        source_column: the name under which the sources are added; empty: they are not.
    """

    rows: Sequence[Row]
    weights: NDArray[np.float64]
    ranks: NDArray[np.int64]
    layers: NDArray[np.int64]
    sources: Sequence[str]
    duplicate_of: Sequence[str | None]
    left_out: Sequence[str]
    source_column: str = "source"

    @classmethod
    def of(cls, selection: Selection, pool: Table) -> Subset:
        """The rows of a selection."""
        order = np.argsort(selection.indices, kind="stable")
        rows = [pool[index] for index in selection.indices[order].tolist()]
        names = short_names(zip(pool.column("source"), pool.column("file"), strict=True))
        firsts = _firsts(pool, {row.hash for row in rows})
        copies = [None if firsts[row.hash] == row.id else firsts[row.hash] for row in rows]
        sources = [names[row.source] for row in rows]
        left_out = [name for name in GIVING_WAY if name in pool.column_names]
        column = "source"
        if column in left_out:
            # Where sources number their own rows, nothing else tells two rows of one `id` apart.
            shared = any(row.id != str(row.columns.get("id", row.id)) for row in rows)
            free = (f"pool_source{number or ''}" for number in count())
            column = next(name for name in free if name not in pool.column_names) if shared else ""
        weights, layers = selection.weights[order], selection.layers[order]
        return cls(rows, weights, order + 1, layers, sources, copies, left_out, column)

    @property
    def mix(self) -> dict[str, int]:
        """Rows of every source, the most first."""
        return dict(Counter(self.sources).most_common())

    @property
    def tokens(self) -> dict[str, int]:
        """How many the rows hold, in all and supervised."""
        supervised = sum(label != IGNORE for row in self.rows for label in row.labels)
        return {"total": sum(len(row.input_ids) for row in self.rows), "supervised": supervised}

    def records(self) -> list[dict[str, Any]]:
        """Every row with its id, its columns, and those that are added."""
        added = zip(self.weights, self.ranks, self.layers, self.sources, self.duplicate_of, strict=True)
        records = []
        for row, (weight, rank, layer, source, copy) in zip(self.rows, added, strict=True):
            more: dict[str, Any] = {"weight": float(weight), "rank": int(rank), "layer": int(layer)}
            if self.source_column:
                more[self.source_column] = source
            if "duplicate_of" not in self.left_out:
                more["duplicate_of"] = copy
            records.append({"id": row.id, **row.columns, **more})
        return records

    def repeats(self, total: int | None = None) -> NDArray[np.int64]:
        """How often every row stands in the repeats file of `total` rows (None: four times the chosen ones)."""
        return apportioned(self.weights, REPEATS * len(self.rows) if total is None else total)


def apportioned(weights: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers from 1 that add up to `total`, as near to proportional to `weights` as may be: int64 [k].

    A row whose share is below 1 gets 1; the others share the rest by largest remainders (Hamilton's method).

    Raises:
        SelectionError: `total` is less than one for each.
    """
    if total < len(weights):
        raise SelectionError(
            f"a repeats file of {total} rows cannot hold the {len(weights)} chosen ones; ask for {len(weights)} or more"
        )
    found = np.ones(len(weights), dtype=np.int64)
    above = np.ones(len(weights), dtype=bool)
    while True:
        left = total - int((~above).sum())
        shares = left * weights[above] / weights[above].sum()
        if not above.any() or (shares >= 1).all():
            break
        above[np.flatnonzero(above)[shares < 1]] = False
    found[above] = np.floor(shares)
    order = np.argsort(found[above] - shares, kind="stable")[: total - int(found.sum())]
    found[np.flatnonzero(above)[order]] += 1
    return found


def write_rows(folder: Path, subset: Subset, repeats: NDArray[np.int64]) -> list[str]:
    """Write `selected.jsonl`, `selected.parquet`, `dataset/` and `repeated.jsonl` into `folder`.

    Returns:
        The columns that are kept as JSON text in `selected.parquet` and `dataset/`, as their values are of several
        types, or a table would change them.
    """
    records = subset.records()
    write_lines(folder / "selected.jsonl", records)
    write_lines(folder / "repeated.jsonl", _repeated(records, repeats))
    texts = {subset.source_column, "duplicate_of"} - set(subset.left_out)
    kinds = _OWN_TYPES | {name: pa.string() for name in texts}
    table, as_text = to_arrow(records, kinds)
    with write_atomic(folder / "selected.parquet") as file:
        pq.write_table(table, file)
    with write_folder(folder / FOLDER) as part:
        _save(table, part)
    return as_text


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON Lines, atomically."""
    with write_atomic(path) as file:
        for record in records:
            file.write((as_json(record) + "\n").encode())


def to_arrow(records: Sequence[dict[str, Any]], kinds: Mapping[str, pa.DataType]) -> tuple[pa.Table, list[str]]:
    """The records as a table with every column that one of them has, and the names of columns that became JSON text.

    `kinds` are the types of columns that are known; those of the others follow from their values.
    """
    names = dict.fromkeys(name for record in records for name in record)
    columns, as_text = {}, []
    for name in names:
        values = [record.get(name) for record in records]
        column = _arrow(values, kinds.get(name))
        if column is None:
            as_text.append(name)
            column = pa.array([None if value is None else as_json(value) for value in values])
        columns[name] = column
    return pa.table(columns), as_text


def _arrow(values: list[Any], kind: pa.DataType | None) -> pa.Array | None:
    """The values as a column, or None if they have no one type that Parquet knows and that gives them back."""
    try:
        column = pa.array(values, kind)
        if not _is_kept(column.type) or not all(map(_comes_back, values, column.to_pylist())):
            return None
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return None
    return column


def _is_kept(kind: pa.DataType, depth: int = 1) -> bool:
    """Whether Parquet and `datasets` keep values of a type: no empty objects, no names with NUL, not nested deep."""
    fields = [kind.field(i) for i in range(kind.num_fields)]
    if depth > _DEPTH or (pa.types.is_struct(kind) and not fields):
        return False
    return all("\0" not in field.name and _is_kept(field.type, depth + 1) for field in fields)


def _comes_back(value: Any, kept: Any) -> bool:
    """Whether a table gives a value back. It fills up objects with null to the keys of the others; that is allowed of
    the objects of a list alone, as of messages: inside a tool call it would be another call."""
    if value == kept:
        return True
    return (
        isinstance(value, list)
        and isinstance(kept, list)
        and len(value) == len(kept)
        and all(
            isinstance(part, dict) and {**dict.fromkeys(full), **part} == full
            for part, full in zip(value, kept, strict=True)
        )
    )


def _save(table: pa.Table, folder: Path) -> None:
    """As `datasets.load_from_disk` reads it; equal rows give equal files."""
    from datasets import Dataset
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        Dataset(table, fingerprint="gradpursuit").save_to_disk(folder)
    finally:
        if shown:
            enable_progress_bars()


def _repeated(records: Sequence[dict[str, Any]], repeats: NDArray[np.int64]) -> Iterable[dict[str, Any]]:
    """Every record once, then those that come again, and so on, so that copies stand far apart.

    They tell `repeats` instead of the weight, which a trainer that does use weights would otherwise count twice.
    """
    for turn in range(int(repeats.max(initial=0))):
        for record, number in zip(records, repeats.tolist(), strict=True):
            if number > turn:
                yield {**{name: value for name, value in record.items() if name != "weight"}, "repeats": number}


def _firsts(pool: Table, hashes: set[str]) -> dict[str, str]:
    """The id of the first row of the pool with each of the hashes."""
    found: dict[str, str] = {}
    for name, digest in zip(pool.ids, pool.column("hash"), strict=True):
        if digest in hashes:
            found.setdefault(digest, name)
    return found


def refuse_reserved_columns(pool: Table) -> None:
    """The export adds columns; a pool that has them already is refused before any work is done.

    Raises:
        SelectionError: naming the first such row.
    """
    for row in pool:
        taken = [name for name in RESERVED if name in row.columns]
        if taken:
            raise SelectionError(
                f"{row.where}: the column '{taken[0]}' is also the name of a column that the export "
                "adds; rename it in the pool"
            )
