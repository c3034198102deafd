"""Rows and files that somebody broke: one message each, or rows that are dropped and counted; nothing hangs."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from breaking import broken_bytes, broken_tree, refusal
from gradpursuit.config import DataSection, ModelSection, SourceSection
from gradpursuit.data import Renderer
from gradpursuit.data.inspection import inspect
from gradpursuit.data.readers import Example, Unreadable, read_examples
from gradpursuit.sources import expand
from gradpursuit.trajectory.model import load_tokenizer

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
GOOD: list[dict[str, Any]] = [
    {"id": "a", "prompt": "What is 1 plus 1?", "completion": "It is 2."},
    {"instruction": "Add.", "input": "1 and 1", "output": "2", "system": "Be short.", "history": [["a", "b"]]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "id": 7},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": 0}]},
    {"messages": [{"role": "user", "content": "Hi"}, CALL, {"role": "tool", "content": "1"}], "tools": [TOOL]},
    {"text": "One plain text."},
]


def read(path: Path) -> list[Example | Unreadable]:
    return list(read_examples(expand([SourceSection(path=str(path))])))


def test_broken_rows(tmp_path: Path, tiny_path: Path) -> None:
    renderer = Renderer(load_tokenizer(ModelSection(path=str(tiny_path))))
    good, path = tmp_path / "good.jsonl", tmp_path / "pool.jsonl"
    good.write_text("".join(json.dumps({"prompt": f"{n} plus?", "completion": f"{n}!"}) + "\n" for n in range(8)))
    config = DataSection.model_validate({"pool": str(path), "target": str(good), "heldout": [], "max_dropped": 1})
    taken = 0
    for seed in range(60):
        made = random.Random(seed)
        rows = [GOOD[0], *(broken_tree(made.choice(GOOD), made) for _ in range(30))]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        message = refusal(lambda: inspect(config, renderer, 3, 0.3, 0), f"seed {seed}")
        taken += message is None
    assert taken > 10


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "csv.gz"])
def test_broken_files(ending: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": f'It is "{n}",\nor so.', "n": n} for n in range(20)]
    buffer = io.StringIO()
    if ending.startswith("jsonl"):
        whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    elif ending == "json":
        whole = json.dumps(rows).encode()
    elif ending.startswith(("csv", "tsv")):
        writer = csv.DictWriter(buffer, ["prompt", "completion", "n"], delimiter="\t" if ending == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        whole = buffer.getvalue().encode()
    else:
        table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
        if ending == "parquet":
            pq.write_table(table, sink)
        else:
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
        whole = sink.getvalue().to_pybytes()
    if ending.endswith(".gz"):
        whole = gzip.compress(whole, mtime=0)
    path = tmp_path / f"pool.{ending}"
    path.write_bytes(whole)
    assert len(read(path)) == 20
    for seed in range(200):
        path.write_bytes(broken_bytes(whole, random.Random(seed)))
        message = refusal(lambda: read(path), f"{ending}, seed {seed}")
        assert message is None or path.name in message, (ending, seed)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
