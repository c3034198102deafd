"""The cleaned examples on disk: one Parquet file per split, tokens beside every original column."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
    ]
)


@dataclass(frozen=True)
class Row:
    """One cleaned example: identity, original columns as JSON text, `input_ids [L]` and `labels [L]`."""

    id: str
    hash: str
    source: str
    line: int
    original: str
    input_ids: list[int]
    labels: list[int]

    @property
    def columns(self) -> dict[str, Any]:
        """Every original column, as it was read."""
        columns: dict[str, Any] = json.loads(self.original)
        return columns


class Table(Sequence[Row]):
    """A split as an immutable sequence of :class:`Row`, in pool order."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    @property
    def ids(self) -> list[str]:
        """Ids, in order."""
        return [row.id for row in self._rows]

    def take(self, indices: Sequence[int]) -> Table:
        """The rows at `indices`, in that order."""
        return Table([self._rows[index] for index in indices])

    def write(self, path: Path) -> None:
        """Write as Parquet, atomically."""
        columns = {name: [getattr(row, name) for row in self._rows] for name in SCHEMA.names}
        table = pa.table(columns, schema=SCHEMA)
        with write_atomic(path) as file:
            pq.write_table(table, file)

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read what :meth:`write` wrote.

        Raises:
            RunError: the file is missing or is not such a table.
        """
        try:
            table = pq.read_table(path)
            if table.column_names != SCHEMA.names:
                raise RunError(f"{path}: not a table of examples: its columns are {', '.join(table.column_names)}")
            table = table.cast(SCHEMA)
        except FileNotFoundError:
            raise RunError(f"{path}: not there; the data stage has not been run") from None
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{path}: not a readable table: {error}") from None
        return cls([Row(**row) for row in table.to_pylist()])
