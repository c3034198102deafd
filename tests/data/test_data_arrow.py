"""Rows that come from Arrow say what the same rows say in JSON."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from gradpursuit.config import SourceSection
from gradpursuit.data.arrow import unpadded
from gradpursuit.data.formats import count, rows
from gradpursuit.data.readers import read_examples
from gradpursuit.errors import DataError
from gradpursuit.sources import Input, expand


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
    elif kind in ("arrow", "stream"):
        new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, new(file, table.schema) as writer:
            writer.write_table(table)
    elif kind == "feather":
        feather.write_feather(table, str(folder / "rows.feather"))
    else:
        from datasets import Dataset

        Dataset.from_list(ROWS).save_to_disk(str(folder / "rows"))
    return folder / {"saved": "rows", "stream": "rows.arrow"}.get(kind, f"rows.{kind}")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream", "feather", "saved"])
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


def written(path: Path, table: pa.Table, new: Callable[..., Any], batch: int | None = None) -> Input:
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return expand([SourceSection(path=str(path))])[0]


WRITERS = [pa.ipc.new_file, pa.ipc.new_stream]


@pytest.mark.parametrize("new", WRITERS)
def test_every_type_of_an_arrow_file(new: Callable[..., Any], tmp_path: Path) -> None:
    name = uuid.UUID(int=5)
    pair = pa.struct([("a", pa.int8()), ("b", pa.int8())])
    columns = {
        "view": (pa.array([[{"a": None, "b": 1}]], pa.list_view(pair)), [{"b": 1}]),
        "uuid": (pa.array([name.bytes], pa.uuid()), name),
        "union": (pa.UnionArray.from_sparse(pa.array([1], pa.int8()), [pa.array([1]), pa.array(["x"])]), "x"),
        "dense": (pa.UnionArray.from_dense(pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([7])]), 7),
        "runs": (pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array(["x"])), "x"),
        "text": (pa.array(["x"], pa.string_view()), "x"),
        "kinds": (pa.array(["x"]).dictionary_encode(), "x"),
    }  # fmt: skip
    made = written(tmp_path / "a.arrow", pa.table({name: column for name, (column, _) in columns.items()}), new)
    assert list(rows(made)) == [(1, {name: value for name, (_, value) in columns.items()})]


@pytest.mark.parametrize("new", WRITERS)
def test_batches_of_an_arrow_file(new: Callable[..., Any], tmp_path: Path) -> None:
    made = written(tmp_path / "a.arrow", pa.table({"n": list(range(2500))}), new, batch=1300)
    assert list(rows(made)) == [(n + 1, {"n": n}) for n in range(2500)]
    assert count(made) == 2500
    with pytest.raises(DataError, match="has no splits, so leave out split: test"):
        list(rows(expand([SourceSection(path=made.path, split="test")])[0]))


@pytest.mark.parametrize("new", WRITERS)
def test_an_arrow_file_that_is_cut_short_anywhere(new: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    made = written(path, pa.table({"n": [1, 2, 3], "text": ["a", "b", "c"]}), new, batch=2)
    whole = path.read_bytes()
    assert len(list(rows(made))) == 3
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.arrow: not readable: "):
            list(rows(made))
    path.write_bytes(whole + whole)
    if new is pa.ipc.new_stream:
        with pytest.raises(DataError, match="more follows after its end"):
            list(rows(made))


def test_other_files_of_the_ending_arrow(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    for content, part in ((b"FEA1" * 9, "Feather of version 1"), (b"PAR1" * 9, "it begins with b'PAR1PA'")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=part):
            list(rows(expand([SourceSection(path=str(path))])[0]))
