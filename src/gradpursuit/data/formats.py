"""The rows of one input, one after the other: each format is read piece by piece, never whole."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from gradpursuit.data.json_array import elements
from gradpursuit.errors import DataError
from gradpursuit.hub import hub_can_be_asked
from gradpursuit.sources import Input

Numbered = tuple[int, dict[str, Any]]  # line (or row, where a format has no lines; from 1) and columns
_BATCH = 1024  # rows of a columnar file that are in memory at a time


def rows(made: Input) -> Iterator[Numbered]:
    """Line (or row) number, from 1, and columns of every row.

    Raises:
        DataError: with file and line, and what to do.
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
        with _arrow_errors(made.path), pq.ParquetFile(made.path) as file:
            return int(file.metadata.num_rows)
    if made.kind in ("saved", "arrow"):
        return len(_data_set(made))
    if made.kind == "hub":
        info = getattr(_streamed(made).info, "splits", None) or {}
        split = info.get(made.source.split or "train")
        return split.num_examples or None if split else None
    return sum(1 for _ in rows(made))


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed."""
    try:
        with Path(path).open("rb") as file, gzip.open(file) if path.lower().endswith(".gz") else file as plain:
            yield cast(IO[bytes], plain)
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _json_lines(made: Input) -> Iterator[Numbered]:
    path = made.path
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8").rstrip(" \t\r\n"))  # what a cut line lacks is lacking on that line
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: not UTF-8: {error.reason}; save it as UTF-8") from None
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}; "
                    "expected one JSON object a line"
                ) from None
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not usable JSON: {error}") from None
            yield number, _object(row, "\\u" if b"\\u" in raw else "", f"{path}:{number}")


def _json(made: Input) -> Iterator[Numbered]:
    """A list of objects, or one object a line."""
    with _opened(made.path) as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if not head.startswith(b"["):
        yield from _json_lines(made)
        return
    with _opened(made.path) as file:
        try:
            for number, text, value in elements(io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")):
                yield number, _object(value, text, f"{made.path}:{number}")
        except UnicodeDecodeError as error:
            raise DataError(f"{made.path}: not UTF-8: {error.reason}; save it as UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(
                f"{made.path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}"
            ) from None
        except RecursionError as error:
            raise DataError(f"{made.path}: not usable JSON: {error}") from None


def _object(row: Any, text: str, where: str) -> dict[str, Any]:
    """`row`, which must be an object, of whole characters; `text` is what it was read from."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if "\\u" in text:  # JSON escapes can hold one half of a surrogate pair, which cannot be written as UTF-8
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise DataError(f"{where}: holds half a character (\\u{ord(half):04x} alone); remove it") from None
    return row


def _csv(made: Input) -> Iterator[Numbered]:
    path = made.path
    csv.field_size_limit(1 << 30)  # the default refuses long texts
    with _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter="\t" if made.kind == "tsv" else ",", strict=True)
        number = 1
        try:
            header = next(reader, [])
            if len(set(header)) != len(header) or "" in header:
                raise DataError(f"{path}:1: the header needs a different name for every column; found {header!r:.200}")
            if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), "")):
                raise DataError(
                    f"{path}:1: the header is one column, {header[0]!r:.100}: the file is separated by {other!r}, "
                    f"not by {reader.dialect.delimiter!r}; save it with commas, or with tabs as .tsv"
                )
            for values in reader:
                start, number = number, reader.line_num
                if not values:
                    continue
                if len(values) != len(header):
                    raise DataError(
                        f"{path}:{start + 1}: has {len(values)} fields, the header has {len(header)}; "
                        "put text that holds commas, quotes or line breaks in quotes"
                    )
                yield start + 1, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: after line {reader.line_num}: not UTF-8: {error.reason}; save it as UTF-8"
            ) from None


@contextmanager
def _arrow_errors(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: cannot be read: No such file or directory") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not readable: {' '.join(str(error).split())[:300]}") from None


def _parquet(made: Input) -> Iterator[Numbered]:
    number = 0
    with _arrow_errors(made.path), pq.ParquetFile(made.path) as file:
        for batch in file.iter_batches(batch_size=_BATCH):
            for columns in batch.to_pylist():
                number += 1
                yield number, columns


def _saved(made: Input) -> Iterator[Numbered]:
    yield from _batches(_data_set(made), made.path)


def _data_set(made: Input) -> Any:
    """A data set of the `datasets` library that lies on this disk, memory-mapped."""
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        found = Dataset.from_file(made.path) if made.kind == "arrow" else load_from_disk(made.path)
    except FileNotFoundError as error:
        raise DataError(f"{made.path}: cannot be read: {error.filename or 'a file of it'} is not there") from None
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{made.path}: not readable: {' '.join(str(error).split())[:300]}") from None
    split = made.source.split
    if isinstance(found, DatasetDict):
        if split not in found:
            asked = f"no split '{split}'" if split else "several splits"
            raise DataError(
                f"{made.path}: holds {asked}; give {{path: {made.path}, split: NAME}} with one of {', '.join(found)}"
            )
        return found[split]
    if split:
        raise DataError(f"{made.path}: has no splits, so leave out split: {split}")
    return found


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
        raise DataError(f"{made.path}: cannot be read from the hub: {' '.join(str(error).split())[:400]}") from None


def _batches(data: Any, path: str) -> Iterator[Numbered]:
    """Rows of a data set, as they are stored: nothing is decoded."""
    number = 0
    with _arrow_errors(path):
        for table in data.with_format("arrow").iter(batch_size=_BATCH):
            for columns in table.to_pylist():
                number += 1
                yield number, columns


_READERS: dict[str, Callable[[Input], Iterator[Numbered]]] = {
    "jsonl": _json_lines,
    "json": _json,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
    "arrow": _saved,
    "saved": _saved,
    "hub": _hub,
}
