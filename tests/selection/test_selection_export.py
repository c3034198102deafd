from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gradpursuit.data import Row, Table
from gradpursuit.errors import DamagedError, RunError
from gradpursuit.selection import Selection
from gradpursuit.selection.export import copies_chosen, read_selection, write_selection


def row(name: str, digest: str | None = None, file: str = "pool.jsonl", **columns: object) -> Row:
    original = json.dumps({"prompt": f"p {name}", "completion": "c", **columns}, ensure_ascii=False)
    return Row(name, digest or f"hash-{name}", file, 1, original, [1, 2], [-100, 2], file)


def pool() -> Table:
    return Table([row(name, tags=["ä", None], nested={"x": 1}) for name in "abcdef"])


def selection() -> Selection:
    path = (Selection.ranked([0]), Selection(np.array([4, 0]), np.array([1.25, 0.75]), np.array([1, 2])))
    evidence = {"path": [], "passes": 3}
    return Selection(np.array([4, 0, 2]), np.array([1.5, 1.0, 0.5]), np.array([1, 1, 2]), evidence, path)


def test_selections_come_back_as_they_were(tmp_path: Path) -> None:
    draws = [selection(), Selection.ranked([1, 5])]
    write_selection(tmp_path, draws, pool())
    again = read_selection(tmp_path, pool())
    assert len(again) == 2
    assert [len(after.path) for after in again] == [2, 0]
    pairs = [*zip(draws, again, strict=True), *zip(draws[0].path, again[0].path, strict=True)]
    for before, after in pairs:
        assert before.indices.tolist() == after.indices.tolist()
        assert before.weights.tolist() == after.weights.tolist()
        assert before.layers.tolist() == after.layers.tolist()
        assert before.evidence == after.evidence


def test_a_selection_of_another_pool_is_refused(tmp_path: Path) -> None:
    write_selection(tmp_path, [selection()], pool())
    with pytest.raises(RunError, match="another pool"):
        read_selection(tmp_path, Table(list(pool())[::-1]))
    with pytest.raises(DamagedError, match=r"elsewhere.*missing; run the selection again"):
        read_selection(tmp_path / "elsewhere", pool())


def test_copies_are_counted_by_text_and_by_the_duplicate_of_column() -> None:
    rows = [
        row("a", "same"),
        row("b", "same"),
        row("c"),
        row("d", duplicate_of="c"),
        row("e", "same", duplicate_of="a"),
        row("f"),
    ]
    table = Table(rows)
    assert copies_chosen(Selection.ranked([0, 2, 5]), table) == 0
    assert copies_chosen(Selection.ranked([0, 1, 5]), table) == 1
    assert copies_chosen(Selection.ranked([2, 3]), table) == 1
    assert copies_chosen(Selection.ranked([0, 1, 2, 3, 4, 5]), table) == 3


@pytest.mark.parametrize("value", [["a"], {"of": "a"}, 1.5, True, False, None, "", [], {"x": [None]}])
def test_a_column_duplicate_of_of_another_type_names_no_row(value: object) -> None:
    table = Table([row("a"), row("b", duplicate_of=value), row("c", duplicate_of=value)])
    assert copies_chosen(Selection.ranked([0, 1, 2]), table) == 0


def test_duplicate_of_is_looked_up_in_its_own_source() -> None:
    rows = [
        row("0"),
        row("1", duplicate_of=0),
        row("b.jsonl/0", file="/x/b.jsonl"),
        row("7", file="/x/b.jsonl", duplicate_of="0"),
        row("8", file="/x/b.jsonl", duplicate_of="1"),
    ]
    table = Table(rows)
    assert copies_chosen(Selection.ranked([0, 1]), table) == 1
    assert copies_chosen(Selection.ranked([2, 3]), table) == 1
    assert copies_chosen(Selection.ranked([0, 3]), table) == 0, "the row 0 of another source"
    assert copies_chosen(Selection.ranked([0, 1, 2, 3, 4]), table) == 2
    assert copies_chosen(Selection.ranked([1, 4]), table) == 0
