"""Arrow files batch by batch, and rows of Arrow tables as they were before they became a table: without its nulls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa

from gradpursuit.errors import DataError

_MORE = b"\xff\xff\xff\xff"  # what every message of a stream begins with, since Arrow 0.15


def record_batches(path: str) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file in order: a stream, as `datasets` writes it, or a file with a footer (Feather 2).

    The file is read, not mapped: one that is cut short is an error, where a mapped one ends the process.

    Raises:
        DataError: it is of another format.
        pyarrow.ArrowInvalid: it is damaged.
        OSError: it cannot be read.
    """
    with pa.OSFile(path) as file:
        head = file.read(6)
        file.seek(0)
        if head == b"ARROW1":
            footed = pa.ipc.open_file(file)
            yield from (footed.get_batch(number) for number in range(footed.num_record_batches))
            return
        if head.startswith(b"FEA1"):
            raise DataError(f"{path}: Feather of version 1, which is not read; save it as Parquet")
        if head[:4] != _MORE and int.from_bytes(head[:4], "little") >= file.size():
            raise DataError(f"{path}: not readable: no Arrow file, it begins with {head!r}; give it its right ending")
        yield from pa.ipc.open_stream(file)
        ended = file.tell() == file.size()
        end = _MORE + bytes(4) if head[:4] == _MORE else bytes(4)
        file.seek(file.size() - len(end))
        if not ended or file.read() != end:
            wrong = "it has no end: it is cut short, or was never closed" if ended else "more follows after its end"
            raise DataError(f"{path}: not readable: {wrong}; write it again")


def unpadded(row: Mapping[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """A row of a table without what its types add: keys of structs that hold null are left out, maps become objects.

    A struct has the same keys in every row, so a table fills up what a row did not have with nulls: the arguments of
    one tool call get those of all others. A null that was in the data from the start cannot be told from these.
    Nulls of whole columns, of lists and of maps, and those within JSON text, are not touched.

    Args:
        row: as `to_pylist` gives it.
        schema: of its table.
    """
    return {name: _unpadded(value, schema.field(name).type) for name, value in row.items()}


def _unpadded(value: Any, kind: pa.DataType) -> Any:
    if value is None or not _is_nested(kind):
        return value
    kind = _storage(kind)
    if isinstance(value, dict) and pa.types.is_struct(kind):
        types = {field.name: field.type for field in kind}
        return {name: _unpadded(item, types[name]) for name, item in value.items() if item is not None}
    if isinstance(value, list) and pa.types.is_map(kind):
        pairs = [(key, _unpadded(item, kind.item_type)) for key, item in value]
        made = dict(pairs) if all(isinstance(key, str) for key, _ in pairs) else {}
        return made if len(made) == len(pairs) else pairs  # keys that are no text, or come twice, fit no object
    if isinstance(value, list) and _is_list(kind):
        return [_unpadded(item, kind.value_type) for item in value]
    return value


@lru_cache(maxsize=1024)
def _is_nested(kind: pa.DataType) -> bool:
    """Whether there is a struct or a map in a type."""
    kind = _storage(kind)
    if _is_list(kind):
        return _is_nested(kind.value_type)
    return bool(pa.types.is_struct(kind) or pa.types.is_map(kind))


def _is_list(kind: pa.DataType) -> bool:
    return any(
        is_one(kind)
        for is_one in (
            pa.types.is_list,
            pa.types.is_large_list,
            pa.types.is_fixed_size_list,
            pa.types.is_list_view,
            pa.types.is_large_list_view,
        )
    )


def _storage(kind: pa.DataType) -> pa.DataType:
    """The type that values of an extension, dictionary or run-end-encoded type have."""
    if isinstance(kind, pa.BaseExtensionType):
        return _storage(kind.storage_type)
    encoded = pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind)
    return _storage(kind.value_type) if encoded else kind
