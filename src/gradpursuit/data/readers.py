"""Training examples out of any input: what each row says, and what identifies it."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradpursuit.config import ColumnName
from gradpursuit.data.formats import rows
from gradpursuit.data.json_text import as_json, is_too_deep, strict, too_deep
from gradpursuit.data.schemas import SCHEMAS, Conversation, recognise
from gradpursuit.errors import DataError
from gradpursuit.sources import Input, short_names

logger = logging.getLogger("gradpursuit")
_PATIENCE = 1000  # rows of an input that may be unreadable before the first one that can be read


@dataclass(frozen=True)
class Example:
    """One row as the user wrote it.

    Attributes:
        id: unique in its split: the row's own `id`, or a hash of its content; copies of one content get `-2`, `-3`,
            ... If an earlier source has a row of that `id` too, it is `source/id`.
        source: the name of its source; the path of its file if the source has no name.
        file: the file, folder or hub id it came from.
        line: its line there, or its row in a format without lines, from 1.
        schema: the name of the schema that was recognised.
        conversation: what it says.
        columns: every original column, unchanged but that NaN and infinity are None.
        original: the columns as JSON text (:func:`~gradpursuit.data.json_text.as_json`).
    """

    id: str
    source: str
    file: str
    line: int
    schema: str
    conversation: Conversation
    columns: Mapping[str, Any]
    original: str


@dataclass(frozen=True)
class Unreadable:
    """One row that is no example.

    Attributes:
        id: the row's own `id` if it has one; otherwise its file and line.
        source: as of an :class:`Example`.
        file: as of an example.
        line: as of an example.
        reason: the kind of mistake, in words that rows with the same one share.
        detail: what is wrong with this row.
    """

    id: str
    source: str
    file: str
    line: int
    reason: str
    detail: str


def read_examples(
    inputs: Sequence[Input], renamed: Mapping[ColumnName, str | None] | None = None
) -> Iterator[Example | Unreadable]:
    """The rows of all inputs, one by one, in order: examples, and what is wrong with rows that are none.

    Args:
        inputs: files, folders and hub data sets.
        renamed: our name of a column to that of the data; a source that maps columns itself goes by its own.

    Raises:
        DataError: an input is missing, empty or damaged; none of its rows can be read (or none of its first 1,000), so
            that the mistake is the file's or the configuration's; or two rows of one source carry the same `id`.
    """
    names = _Names(inputs)
    for made in inputs:
        read = _Reader(made, made.source.columns if made.source.columns is not None else renamed or {}, names)
        held: list[Unreadable] = []  # those before the first example
        found: Example | Unreadable | None = None
        fits = False
        for found in read:
            if not fits and isinstance(found, Unreadable):
                held.append(found)
                if len(held) == _PATIENCE:
                    raise _none_fits(held, "the first ")
                continue
            if not fits:
                yield from held
                fits = True
            yield found
        if found is None:
            raise DataError(f"{made.path}: holds no examples; expected rows with {SCHEMAS}")
        if not fits:
            raise _none_fits(held, "all ")
    names.warn()


def _none_fits(unreadable: Sequence[Unreadable], which: str) -> DataError:
    """The error for an input of which no row can be read; it names the mistake that most rows have."""
    (reason, _), *_ = Counter(row.reason for row in unreadable).most_common(1)
    first = next(row for row in unreadable if row.reason == reason)
    more = f" ({which}{len(unreadable):,} rows cannot be read)" if len(unreadable) > 1 else ""
    return DataError(f"{first.file}:{first.line}: {first.detail}{more}")


class _Reader:
    """Reads one input."""

    def __init__(self, made: Input, mapping: Mapping[ColumnName, str | None], names: _Names) -> None:
        self._made, self._mapping, self._names = made, mapping, names
        self._warned = False

    def __iter__(self) -> Iterator[Example | Unreadable]:
        for line, columns in rows(self._made):
            try:
                yield self._example(line, columns)
            except DataError as error:
                if isinstance(error, _SameIdError):
                    raise
                yield self._unreadable(line, columns, str(error))
            except RecursionError:
                yield self._unreadable(line, columns, str(too_deep()))

    def _example(self, line: int, columns: dict[str, Any] | DataError) -> Example:
        if isinstance(columns, DataError):
            raise columns
        if is_too_deep(columns):
            raise too_deep()
        columns, original = self._kept(columns, line)
        schema, conversation = recognise(columns, self._mapping, self._where(line))
        if is_too_deep([conversation.messages, conversation.tools]):
            raise too_deep()
        digest = content_hash(conversation)  # refuses halves of characters, as in the JSON text of a column
        own = self._own_id(columns)
        name = self._names.of(own, digest, self._made, line)
        return Example(name, self._made.name, self._made.path, line, schema, conversation, columns, original)

    def _kept(self, columns: dict[str, Any], line: int) -> tuple[dict[str, Any], str]:
        """The columns without NaN and infinity, and their JSON text."""
        if named := next((name for name in columns if "\0" in name), None):
            raise DataError(f"column {named!r:.80}: a name with the character NUL, which no table can have; rename it")
        try:
            kept, original = strict(columns)
        except DataError as error:
            raise _in_column(columns, error) from None
        if kept is not columns and not self._warned:
            logger.warning(
                "%s: holds NaN or infinity, which JSON cannot hold; here and in later rows such numbers become null",
                self._where(line),
            )
            self._warned = True
        return kept, original

    def _unreadable(self, line: int, columns: dict[str, Any] | DataError, message: str) -> Unreadable:
        detail = message.removeprefix(f"{self._where(line)}: ")
        own = self._own_id(columns) if isinstance(columns, dict) else None
        has_one = isinstance(own, (str, int)) and own != "" and len(str(own)) < 200
        name = str(own) if has_one else self._where(line)
        return Unreadable(name, self._made.name, self._made.path, line, _kind(detail), detail)

    def _own_id(self, columns: Mapping[str, Any]) -> Any:
        name = self._mapping.get("id", "id")
        return None if name is None else columns.get(name)

    def _where(self, line: int) -> str:
        return f"{self._made.path}:{line}"


def _in_column(columns: Mapping[str, Any], error: DataError) -> DataError:
    """The error with the name of the first column that has it."""
    for name, value in columns.items():
        try:
            as_json({name: value})
        except DataError as found:
            return DataError(f"column {name!r}: {found}")
    return error


def _kind(detail: str) -> str:
    """What is wrong with a row, without what differs from row to row."""
    short = re.split(r"; | at column |, found |: byte ", detail, maxsplit=1)[0]
    return re.sub(r"(?<!UTF-)\d+", "…", short)[:160]


class _SameIdError(DataError):
    """Two rows of one source have the same id: no mistake of one row."""


class _Names:
    """Gives every example its id, and sees that no two have the same; a hundred bytes of memory for each."""

    def __init__(self, inputs: Sequence[Input]) -> None:
        self._short = short_names((made.name, made.path) for made in inputs)
        self._files: list[str] = []
        self._own: dict[int, int] = {}  # a hash of source and own id, to the number of its file and its line
        self._used: set[int] = set()  # hashes of the ids that were given
        self._copies: Counter[str] = Counter()
        self._shared: Counter[str] = Counter()  # by source, own ids that an earlier source has too

    def of(self, own: Any, digest: str, made: Input, line: int) -> str:
        """The id of the example at `line` of an input, whose own id is `own` and whose content has the hash `digest`.

        Raises:
            DataError: the own id is of another type, or another row of the source has it.
        """
        if own is None or own == "":
            return self._free(digest[:16])
        if not isinstance(own, (str, int)) or isinstance(own, bool):
            raise DataError(f"'id' is {own!r:.80}; expected text or a whole number")
        name = str(own)
        key = _key(f"{made.name}\0{name}")
        if not self._files or self._files[-1] != made.path:
            self._files.append(made.path)
        if key in self._own:
            place = self._own[key]
            raise _SameIdError(
                f"{made.path}:{line}: id '{name}' is already used at {self._files[place >> 48]}:"
                f"{place & ((1 << 48) - 1)}; ids must be unique in a source: give the files of a source that number "
                "their own rows no name, or a name each, or set data.columns: {id: null} to ignore the ids"
            )
        self._own[key] = (len(self._files) - 1) << 48 | line
        if self._put(name):
            return name
        self._shared[made.name] += 1
        return self._free(f"{self._short[made.name]}/{name}")

    def warn(self) -> None:
        """Say which sources have ids that earlier ones have too."""
        for source, number in self._shared.items():
            short = self._short[source]
            logger.info("note: %d ids of %s are also those of an earlier source; they are %s/ID", number, short, short)

    def _free(self, base: str) -> str:
        name = base
        while not self._put(name):
            self._copies[base] += 1
            name = f"{base}-{self._copies[base] + 1}"
        return name

    def _put(self, name: str) -> bool:
        key = _key(name)
        if key in self._used:
            return False
        self._used.add(key)
        return True


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=12).digest(), "big")


def content_hash(conversation: Conversation) -> str:
    """sha256 (hex) over roles and texts, with runs of white space folded to one space.

    Raises:
        DataError: a text holds half a character.
    """
    return hashlib.sha256(as_json(conversation.folded()).encode()).hexdigest()
