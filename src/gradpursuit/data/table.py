"""The cleaned examples on disk: one Parquet file per split, tokens beside every original column.

A table that was read leaves its rows on the disk and holds a few thousand of them at a time, so that a pool of millions
fits into any memory. Rows that are read in order are read once.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gradpursuit.errors import RunError
from gradpursuit.files import write_atomic

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("hash", pa.string()),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("original", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("file", pa.string()),
    ]
)
GROUP = 1024  # rows that are written, and read back, together
_HELD = 8  # such groups in memory


@dataclass(frozen=True)
class Row:
    """One cleaned example: identity, original columns as JSON text, `input_ids [L]` and `labels [L]`.

    Attributes:
        id: unique in its split.
        hash: sha256 over its rendered text, white space and case folded: equal for copies up to these, whatever
            their id.
        source: the name of its source.
        line: its line in `file`, from 1.
        original: every original column, as JSON text.
        input_ids: tokens.
        labels: equal to the tokens, or -100.
        file: the file, folder or hub id it came from.
    """

    id: str
    hash: str
    source: str
    line: int
    original: str
    input_ids: list[int]
    labels: list[int]
    file: str = ""

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.file or self.source}:{self.line}"

    @property
    def columns(self) -> dict[str, Any]:
        """Every original column, as it was read; null for NaN and infinity, which tables of earlier versions hold."""
        columns: dict[str, Any] = json.loads(self.original, parse_constant=lambda _: None)
        return columns


class Table(Sequence[Row]):
    """A split as an immutable sequence of :class:`Row`, in pool order."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._groups: _Groups = _InMemory(rows)
        self._places: NDArray[np.int64] | None = None  # of the rows of a part of a table

    def __len__(self) -> int:
        return self._groups.rows if self._places is None else len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._groups.row(place if self._places is None else int(self._places[place]))

    def __iter__(self) -> Iterator[Row]:
        if self._places is None or bool((np.diff(self._places) >= 0).all()):
            return (self[i] for i in range(len(self)))
        found: dict[int, Row] = {place: self._groups.row(place) for place in np.unique(self._places).tolist()}
        return (found[place] for place in self._places.tolist())  # read in the order of the disk

    @property
    def ids(self) -> list[str]:
        """Ids, in order."""
        return self.column("id")

    def column(self, name: str) -> list[Any]:
        """One column of every row, in order, without reading the others."""
        values: list[Any] = self._groups.column(name)
        return values if self._places is None else [values[i] for i in self._places.tolist()]

    @cached_property
    def column_names(self) -> frozenset[str]:
        """Names of the original columns that any row has; the rows are read once, some at a time."""
        return frozenset(name for row in self for name in row.columns)

    def take(self, indices: Sequence[int]) -> Table:
        """The rows at `indices`, in that order; they stay where they are."""
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        taken = Table([])
        taken._groups, taken._places = self._groups, chosen if self._places is None else self._places[chosen]
        return taken

    def write(self, path: Path) -> None:
        """Write as Parquet, atomically."""
        with TableWriter.opened(path) as writer:
            for row in self:
                writer.add(row)

    @classmethod
    def read(cls, path: Path) -> Table:
        """What :meth:`write` or a :class:`TableWriter` wrote.

        Raises:
            RunError: the file is missing or is not such a table.
        """
        table = cls([])
        table._groups = _OnDisk(path)
        return table


class TableWriter:
    """Writes rows to a Parquet file, some at a time."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer, self._rows = writer, list[Row]()

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[TableWriter]:
        """A writer whose file appears under its name when the block ends without an error."""
        with write_atomic(path) as file, pq.ParquetWriter(file, SCHEMA) as writer:
            made = cls(writer)
            yield made
            made._flush()

    def add(self, row: Row) -> None:
        """Write `row` after those before."""
        self._rows.append(row)
        if len(self._rows) == GROUP:
            self._flush()

    def _flush(self) -> None:
        columns = {name: [getattr(row, name) for row in self._rows] for name in SCHEMA.names}
        self._writer.write_table(pa.table(columns, schema=SCHEMA))
        self._rows.clear()


class _Groups(ABC):
    """Where the rows of a table are."""

    rows: int

    @abstractmethod
    def row(self, place: int) -> Row:
        """The row at a place."""

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """One field of all rows."""


class _InMemory(_Groups):
    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)
        self.rows = len(self._rows)

    def row(self, place: int) -> Row:
        return self._rows[place]

    def column(self, name: str) -> list[Any]:
        return [getattr(row, name) for row in self._rows]


class _OnDisk(_Groups):
    """Row groups of a Parquet file; those last used stay in memory."""

    def __init__(self, path: Path) -> None:
        self._path, self._held = path, OrderedDict[int, dict[str, Any]]()
        try:
            self._file = pq.ParquetFile(path)
        except FileNotFoundError:
            raise RunError(f"{path}: not there; the data stage has not been run") from None
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{path}: not a readable table: {error}") from None
        schema = self._file.schema_arrow
        if schema.names != SCHEMA.names:
            raise RunError(f"{path}: not a table of examples: its columns are {', '.join(schema.names)}")
        if schema.types != SCHEMA.types:
            raise RunError(f"{path}: not a readable table: its columns are of other types")
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.rows = int(self._starts[-1])

    def row(self, place: int) -> Row:
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        group, i = self._group(number), place - int(self._starts[number])
        values = [
            column[1][column[0][i] : column[0][i + 1]].tolist() if isinstance(column, tuple) else column[i]
            for column in group.values()
        ]
        return Row(**dict(zip(SCHEMA.names, values, strict=True)))

    def column(self, name: str) -> list[Any]:
        with self._errors():
            values: list[Any] = self._file.read(columns=[name])[name].to_pylist()
        return values

    def _group(self, number: int) -> dict[str, Any]:
        """Columns of one row group: lists, and for lists of tokens their offsets and values."""
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        with self._errors():
            table = self._file.read_row_group(number).combine_chunks()
        group: dict[str, Any] = {}
        for name in SCHEMA.names:
            column = table[name].combine_chunks()
            if pa.types.is_list(column.type):
                group[name] = (column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False))
            else:
                group[name] = column.to_pylist()
        self._held[number] = group
        if len(self._held) > _HELD:
            self._held.popitem(last=False)
        return group

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{self._path}: not a readable table: {error}") from None
