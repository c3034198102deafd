"""Rows that come from Arrow say what the same rows say in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradpursuit.config import SourceSection
from gradpursuit.data.arrow import unpadded
from gradpursuit.data.readers import read_examples
from gradpursuit.sources import expand


def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A conversation with one call, and the tool that it calls."""
    properties = {key: {"type": "string"} for key in arguments}
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "messages": [{"role": "user", "content": name}, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}],
        "note": None,
    }


ROWS = [row("weather", {"city": "Bergen"}), row("convert", {"amount": "1", "unit": "EUR"}), row("now", {})]


def save(kind: str, folder: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    if kind == "parquet":
        pq.write_table(table, folder / "rows.parquet")
    elif kind == "arrow":
        with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        from datasets import Dataset

        Dataset.from_list(ROWS).save_to_disk(str(folder / "rows"))
    return folder / {"parquet": "rows.parquet", "arrow": "rows.arrow", "saved": "rows"}[kind]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_the_same_rows_as_from_json(kind: str, tmp_path: Path) -> None:
    plain = tmp_path / "rows.json"
    plain.write_text(json.dumps(ROWS))
    found = list(read_examples(expand([SourceSection(path=str(save(kind, tmp_path)))])))
    wanted = list(read_examples(expand([SourceSection(path=str(plain))])))
    assert [example.conversation for example in found] == [example.conversation for example in wanted]
    assert [example.id for example in found] == [example.id for example in wanted]
    assert [dict(example.columns) for example in found] == ROWS


def test_nulls_that_a_type_does_not_add_stay() -> None:
    inner = pa.struct([("a", pa.int64()), ("b", pa.int64())])
    kinds = {
        "column": (pa.int64(), None, None),
        "list": (pa.list_(pa.int64()), [1, None], [1, None]),
        "structs": (pa.list_(inner), [{"a": 1, "b": None}, None], [{"a": 1}, None]),
        "empty": (pa.struct([("in", inner)]), {"in": {"a": None, "b": None}}, {"in": {}}),
        "map": (pa.map_(pa.string(), inner), [("k", {"a": None, "b": 2})], {"k": {"b": 2}}),
        "nothing": (pa.map_(pa.string(), pa.int64()), [("k", None)], {"k": None}),
        "numbers": (pa.map_(pa.int64(), pa.int64()), [(1, 2)], [(1, 2)]),
        "large": (pa.large_list(inner), [{"a": None, "b": 2}], [{"b": 2}]),
        "fixed": (pa.list_(inner, 1), [{"a": None, "b": 2}], [{"b": 2}]),
        "text": (pa.string(), '{"a": null}', '{"a": null}'),
    }
    schema = pa.schema([(name, kind) for name, (kind, _, _) in kinds.items()])
    table = pa.Table.from_pylist([{name: value for name, (_, value, _) in kinds.items()}], schema=schema)
    assert unpadded(table.to_pylist()[0], schema) == {name: wanted for name, (_, _, wanted) in kinds.items()}
