"""Rows of Arrow tables as they were before they became a table: without the nulls that its structs add."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa


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
    """The type that values of an extension or dictionary type have."""
    if isinstance(kind, pa.BaseExtensionType):
        return _storage(kind.storage_type)
    return _storage(kind.value_type) if pa.types.is_dictionary(kind) else kind
