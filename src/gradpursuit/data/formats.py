"""The rows of one input, one after the other: each format is read piece by piece, never whole."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from gradpursuit.data.arrow import record_batches, unpadded
from gradpursuit.data.file_kinds import refuse_several_lines, require_kind, saved_folder
from gradpursuit.data.json_array import elements
from gradpursuit.data.json_text import parse, too_deep
from gradpursuit.errors import DataError, GradPursuitError
from gradpursuit.hub import hub_can_be_asked
from gradpursuit.sources import Input

Numbered = tuple[
    int, "dict[str, Any] | DataError"
]  # line (or row, without lines; from 1), and columns or what is wrong
_BATCH = 1024  # rows of a columnar file that are in memory at a time
_HEAD = 1 << 20  # bytes that are looked at to say what a file is
_LONGEST = 1 << 28  # bytes of a line: a longer one is not even held


def rows(made: Input) -> Iterator[Numbered]:
    """Line (or row) number, from 1, and columns of every row; of a row that cannot be read, an error without a place.

    Raises:
        DataError: the file as a whole cannot be read: with its name, and what to do.
    """
    yield from _READERS[made.kind](made)


def count(made: Input) -> int | None:
    """How many rows :func:`rows` will find; None if only reading them tells.

    Raises:
        DataError: it cannot be read.
    """
    if made.kind == "jsonl":
        with _opened(made.path) as file:
            return sum(1 for line in file if line.strip())
    if made.kind == "parquet":
        with _arrow_errors(made.path):
            _require_own(made)
        with _arrow_errors(made.path), pq.ParquetFile(made.path) as file:
            return int(file.metadata.num_rows)
    if made.kind == "arrow":
        with _arrow_errors(made.path):
            _require_own(made)
            return sum(batch.num_rows for batch in record_batches(made.path))
    if made.kind == "saved":
        return len(_data_set(made))
    if made.kind == "hub":
        info = getattr(_streamed(made).info, "splits", None) or {}
        split = info.get(made.source.split or "train")
        return split.num_examples or None if split else None
    return sum(1 for _ in rows(made))


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a text file, decompressed."""
    try:
        with Path(path).open("rb") as file, gzip.open(file) if path.lower().endswith(".gz") else file as plain:
            raw = file.peek(512)[:512]
            if not raw.startswith(b"\x1f\x8b") or plain is file:
                require_kind(path, "text", raw)
            head = cast(io.BufferedReader, plain).peek(512)[:512]
            if plain is not file:
                require_kind(path, "text", head, packed=True)
            head = head[:64]
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head.count(0) > len(head) // 3:
                raise DataError(f"{path}: not UTF-8 but UTF-16, or no text; save it as UTF-8")
            yield cast(IO[bytes], plain)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        other = "; if it is not compressed, name it without .gz" if str(error).startswith("Not a gzipped") else ""
        raise DataError(f"{path}: not a whole gzip file: {error}{other}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of every line that is not blank; None for one that is too long to be held."""
    number = 0
    while raw := file.readline(_LONGEST):
        number += 1
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if len(raw) < _LONGEST or raw.endswith(b"\n"):
            if raw.strip():
                yield number, raw
            continue
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(_LONGEST)
        yield number, None


def _json_lines(made: Input) -> Iterator[Numbered]:
    first = True
    with _opened(made.path) as file:
        for number, raw in _lines(file):
            found = _parsed_line(raw)
            if first and isinstance(found, DataError) and raw is not None and len(raw) < _HEAD:
                more = cast(io.BufferedReader, file).read(_HEAD)
                refuse_several_lines(made.path, number, (raw + more).decode("utf-8", "replace"), cut=len(more) == _HEAD)
                yield number, found
                yield from _rest(made.path, number)
                return
            first = False
            yield number, found


def _rest(path: str, after: int) -> Iterator[Numbered]:
    with _opened(path) as file:
        for number, raw in _lines(file):
            if number > after:
                yield number, _parsed_line(raw)


def _parsed_line(raw: bytes | None) -> dict[str, Any] | DataError:
    if raw is None:
        return DataError(f"a line of more than {_LONGEST >> 20} MiB; expected one JSON object a line")
    try:
        return _object(parse(raw.decode("utf-8").rstrip(" \t\r\n")))  # what a cut line lacks is lacking on that line
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8")
    except DataError as error:
        return error


def _json(made: Input) -> Iterator[Numbered]:
    """A list of objects, or one object a line."""
    with _opened(made.path) as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if not head.startswith(b"["):
        yield from _json_lines(made)
        return
    with _opened(made.path) as file:
        # Other bytes become halves of characters, which are found row by row.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n")
        try:
            for number, value in elements(text):
                yield number, value if isinstance(value, DataError) else _object(value)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{made.path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
            ) from None
        except RecursionError:
            raise DataError(f"{made.path}: not usable JSON: {too_deep()}") from None


def _object(row: Any) -> dict[str, Any] | DataError:
    return row if isinstance(row, dict) else DataError(f"expected a JSON object, found {type(row).__name__}")


def _csv(made: Input) -> Iterator[Numbered]:
    path = made.path
    csv.field_size_limit(_LONGEST)  # the default refuses long texts
    with _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, delimiter="\t" if made.kind == "tsv" else ",", strict=True)
        try:
            header = _header(path, next(reader, []), reader.dialect.delimiter)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None
        while True:
            start = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if str(error).startswith("unexpected end"):  # the rest of the file lies in that quote
                    raise DataError(
                        f"{path}:{start}: not valid CSV: {error}: a quote is opened there and never closed"
                    ) from None
                yield start, DataError(f"not valid CSV: {error}")
                continue
            if not values:
                continue
            if len(values) != len(header):
                yield (
                    start,
                    DataError(
                        f"has {len(values)} fields, the header has {len(header)}; "
                        "put text that holds commas, quotes or line breaks in quotes"
                    ),
                )
                continue
            yield start, dict(zip(header, values, strict=True))


def _header(path: str, header: list[str], delimiter: str) -> list[str]:
    """The names of the columns.

    Raises:
        DataError: they do not serve.
    """
    if len(set(header)) != len(header) or "" in header:
        raise DataError(f"{path}:1: the header needs a different name for every column; found {header!r:.200}")
    if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), "")):
        raise DataError(
            f"{path}:1: the header is one column, {header[0]!r:.100}: the file is separated by {other!r}, "
            f"not by {delimiter!r}; save it with commas, or with tabs as .tsv"
        )
    return header


@contextmanager
def _arrow_errors(path: str) -> Iterator[None]:
    try:
        yield
    except GradPursuitError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: cannot be read: No such file or directory") from None
    except Exception as error:  # of damaged files the libraries raise many kinds
        raise DataError(f"{path}: not readable: {_said(error)}") from None


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _parquet(made: Input) -> Iterator[Numbered]:
    number = 0
    with _arrow_errors(made.path):
        _require_own(made)
    with _arrow_errors(made.path), pq.ParquetFile(made.path) as file:
        for batch in file.iter_batches(batch_size=_BATCH):
            for columns in _dicts(batch, made.path):
                number += 1
                yield number, columns


def _require_own(made: Input) -> None:
    with Path(made.path).open("rb") as file:
        require_kind(made.path, made.kind, file.read(512))


def _dicts(table: pa.Table | pa.RecordBatch, path: str) -> list[dict[str, Any] | DataError]:
    """The rows of a table as Python values, without the nulls that Arrow added to structs; of a row with a value that
    Python has not, an error.

    Raises:
        DataError: two columns have the same name.
    """
    names = table.schema.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{path}: has two columns of the name '{twice[0]}'; rename one of them")
    try:
        made = list(table.to_pylist())
    except Exception:  # text that is not UTF-8, dates of no calendar, unknown time zones: one value spoils them all
        made = [_dict(table, i) for i in range(table.num_rows)]
    return [row if isinstance(row, DataError) else unpadded(row, table.schema) for row in made]


def _dict(table: pa.Table | pa.RecordBatch, index: int) -> dict[str, Any] | DataError:
    row = {}
    for name in table.schema.names:
        try:
            row[name] = table[name][index].as_py()
        except Exception as error:
            return DataError(f"column '{name}' cannot be read: {_said(error)}")
    return row


def _arrow(made: Input) -> Iterator[Numbered]:
    if made.source.split:
        raise DataError(f"{made.path}: has no splits, so leave out split: {made.source.split}")
    number = 0
    with _arrow_errors(made.path):
        _require_own(made)
        for batch in record_batches(made.path):
            _require_sound(batch)
            for start in range(0, batch.num_rows, _BATCH):
                for columns in _dicts(batch.slice(start, _BATCH), made.path):
                    number += 1
                    yield number, columns


def _saved(made: Input) -> Iterator[Numbered]:
    yield from _batches(_data_set(made), made.path)


def _data_set(made: Input) -> Any:
    """A data set of the `datasets` library that lies on this disk, memory-mapped."""
    from datasets import load_from_disk

    folder = saved_folder(made.path, made.source.split)
    try:
        return load_from_disk(folder)
    except FileNotFoundError as error:
        raise DataError(f"{made.path}: cannot be read: {error.filename or 'a file of it'} is not there") from None
    except Exception as error:  # of damaged folders the library raises many kinds
        raise DataError(f"{made.path}: not readable: {_said(error)}") from None


def _hub(made: Input) -> Iterator[Numbered]:
    yield from _batches(_streamed(made), made.path)


def _streamed(made: Input) -> Any:
    """A hub data set, to be read row by row; data sets that are Python code are refused by the library."""
    from datasets import load_dataset

    source = made.source
    if not hub_can_be_asked():
        raise DataError(
            f"{made.path}: there is no such file or folder here, and the hub cannot be reached to look for a data set "
            "of that id; check path and network, or download it first and name its files"
        )
    try:
        return load_dataset(
            made.path, source.subset, split=source.split or "train", revision=source.revision, streaming=True
        )
    except Exception as error:  # the library and its network client raise many kinds
        raise DataError(f"{made.path}: cannot be read from the hub: {_said(error)}") from None


def _batches(data: Any, path: str) -> Iterator[Numbered]:
    """Rows of a data set, as they are stored: nothing is decoded; nulls that Arrow added to structs are left out."""
    number = 0
    with _arrow_errors(path):
        for table in data.with_format("arrow").iter(batch_size=_BATCH):
            _require_sound(table)
            for columns in _dicts(table, path):
                number += 1
                yield number, columns


def _require_sound(table: pa.Table | pa.RecordBatch) -> None:
    """Refuse a damaged table: Arrow reads its files as they are, and where an offset points outside the process dies.

    Raises:
        pyarrow.ArrowInvalid: a column is damaged; text that is not UTF-8 spoils its row alone, see :func:`_dicts`.
    """
    for column in table.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if not (pa.types.is_string(column.type) and "UTF8" in str(error)):
                raise


_READERS: dict[str, Callable[[Input], Iterator[Numbered]]] = {
    "jsonl": _json_lines,
    "json": _json,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "saved": _saved,
    "hub": _hub,
}
