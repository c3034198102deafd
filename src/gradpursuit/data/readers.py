"""Training examples out of any input: what each row says, and what identifies it."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from gradpursuit.config import ColumnName
from gradpursuit.data.formats import rows
from gradpursuit.data.schemas import SCHEMAS, Conversation, recognise
from gradpursuit.errors import DataError
from gradpursuit.sources import Input


@dataclass(frozen=True)
class Example:
    """One row as the user wrote it.

    Attributes:
        id: the row's own `id`, or a hash of its content; copies of one content get `-2`, `-3`, ...
        source: the name of its source; the path of its file if the source has no name.
        file: the file, folder or hub id it came from.
        line: its line there, or its row in a format without lines, from 1.
        schema: the name of the schema that was recognised.
        conversation: what it says.
        columns: every original column, unchanged.
    """

    id: str
    source: str
    file: str
    line: int
    schema: str
    conversation: Conversation
    columns: Mapping[str, Any]

    @property
    def original(self) -> str:
        """Every original column as JSON text: :func:`as_json`."""
        return as_json(self.columns, f"{self.file}:{self.line}")


def read_examples(inputs: Iterable[Input], renamed: Mapping[ColumnName, str] | None = None) -> Iterator[Example]:
    """The examples of all inputs, one by one, in order.

    Args:
        inputs: files, folders and hub data sets.
        renamed: our name of a column to that of the data; a source that maps columns itself goes by its own.

    Raises:
        DataError: an input is missing or empty, a row cannot be read or has no known schema (file and line named), or
            two rows carry the same `id`.
    """
    names = _Names()
    for made in inputs:
        mapping: Mapping[ColumnName, str] = made.source.columns if made.source.columns is not None else renamed or {}
        empty = True
        for line, columns in rows(made):
            empty = False
            where = f"{made.path}:{line}"
            schema, conversation = recognise(columns, mapping, where)
            own = columns.get(mapping.get("id", "id"))
            name = names.of(own, conversation, made.path, line)
            yield Example(name, made.name, made.path, line, schema, conversation, columns)
        if empty:
            raise DataError(f"{made.path}: holds no examples; expected rows with {SCHEMAS}")


class _Names:
    """Gives every example its id, and sees that no two have the same; a hundred bytes of memory for each."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._places: dict[int, int] = {}  # a hash of the id, to the number of its file and its line
        self._copies: Counter[str] = Counter()

    def of(self, own: Any, conversation: Conversation, file: str, line: int) -> str:
        """The id of the example at `line` of `file`, whose own id is `own`."""
        if own is None or own == "":
            name = base = content_hash(conversation)[:16]
            while not self._put(name, file, line):
                self._copies[base] += 1
                name = f"{base}-{self._copies[base] + 1}"
            return name
        if not isinstance(own, (str, int)) or isinstance(own, bool):
            raise DataError(f"{file}:{line}: 'id' is {own!r}; expected text or a whole number")
        name = str(own)
        if not self._put(name, file, line):
            place = self._places[_key(name)]
            raise DataError(
                f"{file}:{line}: id '{name}' is already used at {self._files[place >> 48]}:{place & ((1 << 48) - 1)}; "
                "ids must be unique, or leave the 'id' column out"
            )
        return name

    def _put(self, name: str, file: str, line: int) -> bool:
        if not self._files or self._files[-1] != file:
            self._files.append(file)
        key = _key(name)
        if key in self._places:
            return False
        self._places[key] = (len(self._files) - 1) << 48 | line
        return True


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=12).digest(), "big")


def content_hash(conversation: Conversation) -> str:
    """sha256 (hex) over roles and texts, with runs of white space folded to one space."""
    return hashlib.sha256(json.dumps(conversation.folded(), ensure_ascii=False, default=str).encode()).hexdigest()


def as_json(columns: Mapping[str, Any], where: str) -> str:
    """The columns of a row as JSON text; dates and decimal numbers become text.

    Raises:
        DataError: a column holds bytes, which JSON cannot.
    """
    try:
        return json.dumps(columns, ensure_ascii=False, default=_as_text)
    except TypeError as error:
        named = next((name for name, value in columns.items() if not _is_json(value)), "?")
        raise DataError(f"{where}: column '{named}' {error}; leave it out") from None


def _as_text(value: Any) -> str:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (Decimal, datetime.timedelta)):
        return str(value)
    raise TypeError(f"holds {type(value).__name__}, which cannot be kept as JSON")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, default=_as_text)
    except TypeError:
        return False
    return True
