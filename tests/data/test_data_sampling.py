"""A sample of a pool keeps the rows that cannot be read, which are dropped from it as they are in a run."""

from __future__ import annotations

import json
from pathlib import Path

from gradpursuit.config import SourceSection
from gradpursuit.data import Unreadable, draw, read_examples
from gradpursuit.sources import expand


def test_rows_that_cannot_be_read_are_drawn_as_such(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    good = [json.dumps({"prompt": str(i), "completion": "a"}) for i in range(30)]
    path.write_text("\n".join([*good[:15], *["{broken"] * 30, *good[15:]]) + "\n")
    drawn, each = draw([SourceSection(path=str(path), name="mine")], 40, tmp_path)
    found = list(read_examples(expand(drawn)))
    assert (len(found), each) == (40, 1.5)
    broken = [row for row in found if isinstance(row, Unreadable)]
    assert 10 <= len(broken) < 30
    assert {row.source for row in found} == {"mine"}
