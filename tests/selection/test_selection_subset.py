"""The files of a subset come back, in every reader, as the rows that they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import load_dataset, load_from_disk
from hypothesis import given
from hypothesis import strategies as st

from gradpursuit.data import IGNORE, Row, Table
from gradpursuit.errors import SelectionError
from gradpursuit.files import sha256_of
from gradpursuit.selection import Selection
from gradpursuit.selection.card import Origin, write_subset
from gradpursuit.selection.subset import Subset, apportioned, refuse_reserved_columns

ORIGIN = Origin("gtp", "3 rows", "my|model", "its target", {"pool.jsonl": 5, "`b`|c.jsonl": 1}, 7)


def row(name: str, digest: str | None = None, file: str = "/x/pool.jsonl", **columns: object) -> Row:
    original = {"id": name, "prompt": f"p {name}", "completion": "c", **columns}
    return Row(name, digest or f"hash-{name}", file, 1, json.dumps(original), [1, 2], [IGNORE, 2], file)


def pool(**columns: object) -> Table:
    rows = [row(name, tags=["ä", None], nested={"x": 1}, **columns) for name in "abcd"]
    return Table([*rows, row("e", "hash-a", extra=[1]), row("f", file="/x/`b`|c.jsonl")])


def selection() -> Selection:
    return Selection(np.array([4, 0, 2]), np.array([2.0, 0.25, 0.75]), np.array([1, 1, 2]))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def cached(tmp_path: Path) -> dict[str, Any]:
    return {"cache_dir": str(tmp_path / "cache"), "split": "train"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_subset(tmp_path / "subset", Subset.of(selection(), pool()), ORIGIN)
    return tmp_path / "subset"


def test_rows_keep_their_columns_and_the_order_of_the_pool(folder: Path) -> None:
    rows = lines(folder / "selected.jsonl")
    table = pool()
    assert [found["id"] for found in rows] == ["a", "c", "e"]
    for found, index in zip(rows, (0, 2, 4), strict=True):
        original = table[index].columns
        assert list(found) == [*original, "weight", "rank", "layer", "source", "duplicate_of"]
        assert original.items() <= found.items()
    assert [found["weight"] for found in rows] == [0.25, 0.75, 2.0]
    assert [(found["rank"], found["layer"], found["duplicate_of"]) for found in rows] == [
        (2, 1, None),
        (3, 2, None),
        (1, 1, "a"),
    ]
    assert {found["source"] for found in rows} == {"pool.jsonl"}


def test_every_reader_gets_the_same_rows(folder: Path, tmp_path: Path) -> None:
    wanted = lines(folder / "selected.jsonl")
    names = dict.fromkeys(name for found in wanted for name in found)
    filled = [{name: found.get(name) for name in names} for found in wanted]
    options = cached(tmp_path)
    read = {
        "jsonl": load_dataset("json", data_files=str(folder / "selected.jsonl"), **options),
        "parquet": load_dataset("parquet", data_files=str(folder / "selected.parquet"), **options),
        "card": load_dataset(str(folder), **options),  # by the card's own words
        "disk": load_from_disk(str(folder / "dataset")),
    }
    for name, found in read.items():
        assert found.to_list() == filled, name
    assert read["disk"].column_names == list(names)


def test_equal_rows_give_equal_files(folder: Path, tmp_path: Path) -> None:
    write_subset(tmp_path / "again", Subset.of(selection(), pool()), ORIGIN)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 7
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_repeats_file_stands_for_the_weights(folder: Path, tmp_path: Path) -> None:
    rows = lines(folder / "repeated.jsonl")
    assert [found["id"] for found in rows] == ["a", "c", "e", "c", "e", "c", *"eeeeee"]
    assert {found["id"]: found["repeats"] for found in rows} == {"a": 1, "c": 3, "e": 8}  # of 1, 3 and 8 twelfths
    assert all("weight" not in found for found in rows)
    assert load_dataset("json", data_files=str(folder / "repeated.jsonl"), **cached(tmp_path)).num_rows == 12
    figures = write_subset(tmp_path / "more", Subset.of(selection(), pool()), ORIGIN, 30)
    assert figures["repeated"] == 30 == len(lines(tmp_path / "more" / "repeated.jsonl"))
    with pytest.raises(SelectionError, match="a repeats file of 2 rows cannot hold the 3 chosen ones; ask for 3 or mo"):
        write_subset(tmp_path / "less", Subset.of(selection(), pool()), ORIGIN, 2)
    assert not (tmp_path / "less").exists()


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), st.integers(0, 200))
def test_repeats_add_up_and_follow_the_weights(weights: list[float], more: int) -> None:
    made = np.array(weights)
    found = apportioned(made, len(made) + more)
    assert found.sum() == len(made) + more
    assert found.min() >= 1
    exact = found.sum() * made / made.sum()
    assert (
        found <= np.maximum(1, np.ceil(exact))
    ).all()  # whoever gets more than a fair share gets the one row it needs
    order = np.argsort(made)
    assert (np.diff(found[order])[np.diff(made[order]) > 0] >= 0).all()


def test_folders_of_one_name_are_not_taken_for_one_another(tmp_path: Path) -> None:
    chosen = selection()
    parts = {"k-3": chosen, "k-2": Selection(chosen.indices[:2], chosen.weights[:2], chosen.layers[:2])}
    for name, part in parts.items():
        write_subset(tmp_path / name / "gtp", Subset.of(part, pool()), ORIGIN)
    for name, part in parts.items():
        assert load_dataset(str(tmp_path / name / "gtp"), **cached(tmp_path)).num_rows == len(part.indices)


def test_the_card_is_yaml_and_markdown(folder: Path) -> None:
    text = (folder / "README.md").read_text("utf-8")
    _, head, body = text.split("---\n", 2)
    found = yaml.safe_load(head)
    name = f"rows-{sha256_of(folder / 'selected.parquet')[:16]}"
    assert found["configs"] == [{"config_name": name, "data_files": "selected.parquet"}]
    assert found["size_categories"] == ["n<1K"]
    assert "3 of 6 rows of a pool, chosen for its target with the strategy `gtp`" in body
    assert "| pool.jsonl | 5 | 3 |" in body
    assert "| \\`b\\`\\|c.jsonl | 1 | 0 |" in body
    assert "`repeated.jsonl`: 12 whole rows, each as often (`repeats`, from 1 to 8)" in body


def test_columns_of_the_pool_are_not_overwritten(tmp_path: Path) -> None:
    subset = Subset.of(selection(), pool(source="mine"))
    assert subset.left_out == ["source"]
    assert [found.get("source") for found in subset.records()] == ["mine", "mine", None]
    assert [found["duplicate_of"] for found in subset.records()] == [None, None, "a"]
    figures = write_subset(tmp_path, subset, ORIGIN)
    assert figures["columns_left_out"] == ["source"]
    assert "The rows have `source` of their own" in (tmp_path / "README.md").read_text("utf-8")
    others = Table([*pool(), row("z", **{"duplicate_of": "a"})])
    assert Subset.of(selection(), others).left_out == ["duplicate_of"], "though no chosen row has such a column"
    refuse_reserved_columns(pool())
    for name in ("weight", "rank", "layer", "repeats"):
        with pytest.raises(SelectionError, match=rf"pool\.jsonl:1: the column '{name}'"):
            refuse_reserved_columns(Table([row("a", **{name: 2})]))


def test_values_without_one_type_become_text_where_they_must(tmp_path: Path) -> None:
    values: list[Any] = [1, "one", {"x": {}}]
    table = Table([row(name, answer=value, empty={}) for name, value in zip("abc", values, strict=True)])
    figures = write_subset(tmp_path, Subset.of(Selection.ranked([0, 1, 2]), table), ORIGIN)
    assert figures["columns_as_text"] == ["answer", "empty"]
    assert [found["answer"] for found in lines(tmp_path / "selected.jsonl")] == values
    for found in (load_from_disk(str(tmp_path / "dataset")), load_dataset(str(tmp_path), **cached(tmp_path))):
        assert [json.loads(text) for text in found["answer"]] == values
        assert [json.loads(text) for text in found["empty"]] == [{}, {}, {}]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


def calls(*given: dict[str, Any]) -> list[dict[str, Any]]:
    said = [{"role": "assistant", "content": "", "tool_calls": [{"name": "n", "arguments": each}]} for each in given]
    return [{"role": "user", "content": "q"}, *said]


@pytest.mark.parametrize(
    ("values", "as_text"),
    [
        ([1, 2.5, None], False),
        ([True, 1, None], True),
        (["a", 1, None], True),
        ([2**70, 1, 0], True),
        ([2**60 + 1, 0.5, 1], True),
        ([{"a": 1}, {"a": 2}, None], False),
        ([{"a": 1}, {"b": 2}, None], True),
        ([{}, {"a": {}}, None], True),
        ([[], None, [1]], False),
        ([nested(2), nested(2), None], False),
        ([nested(45), nested(45), None], True),
        ([{"a\0b": 1}, {"a\0b": 2}, None], True),
        ([calls({"x": 1}), calls({"x": 2}, {"x": 3}), None], False),
        ([calls({"x": 1}), calls({"y": 1}), None], True),
        ([[float("nan")], [1.0], [2.0]], False),
    ],
)
def test_columns_of_any_type_agree_in_every_file(tmp_path: Path, values: list[Any], as_text: bool) -> None:
    table = Table([row(name, column=value) for name, value in zip("abc", values, strict=True)])
    write_subset(tmp_path / "s", Subset.of(Selection(np.arange(3), np.ones(3), np.ones(3, int)), table), ORIGIN)

    def strict(name: str) -> list[dict[str, Any]]:
        text = (tmp_path / "s" / name).read_text("utf-8")
        return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]

    found = [record["column"] for record in strict("selected.jsonl")]
    assert found == json.loads(json.dumps(values), parse_constant=lambda _: None)
    assert [record["column"] for record in strict("repeated.jsonl")][:3] == found
    stored = [record["column"] for record in load_from_disk(tmp_path / "s" / "dataset").to_list()]
    if as_text:
        stored = [None if value is None else json.loads(value) for value in stored]
    for before, after in zip(found, stored, strict=True):
        if before and isinstance(before[0] if isinstance(before, list) else None, dict):
            after = [{key: value for key, value in message.items() if value is not None} for message in after]
        assert before == after


def test_rows_of_sources_that_number_their_own_are_told_apart() -> None:
    rows = [
        row("0", source="web"),
        Row("b.jsonl/0", "h", "/x/b.jsonl", 1, json.dumps({"id": 0, "prompt": "p"}), [1], [1], "/x/b.jsonl"),
    ]
    made = Subset.of(Selection(np.arange(2), np.ones(2), np.ones(2, int)), Table(rows))
    assert [(record["id"], record["pool_source"]) for record in made.records()] == [("0", "pool.jsonl"), (0, "b.jsonl")]
    assert made.records()[0]["source"] == "web"
    plain = Subset.of(Selection(np.arange(1), np.ones(1), np.ones(1, int)), Table(rows))
    assert "pool_source" not in plain.records()[0]
