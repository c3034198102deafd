"""The data stage: drops with reasons, leaks, the split that keeps copies together, tables that come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradpursuit.config import DataSection
from gradpursuit.data import Renderer, Row, Table, prepare
from gradpursuit.errors import DataError, RunError


@pytest.fixture(scope="module")
def renderer(smollm2_path: Path) -> Renderer:
    from transformers import AutoTokenizer

    return Renderer(AutoTokenizer.from_pretrained(smollm2_path))


def lines(path: Path, *rows: Any) -> str:
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    )
    return str(path)


def pair(prompt: str, completion: str = "a", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def pairs(prefix: str, count: int) -> list[dict[str, Any]]:
    return [pair(f"{prefix}{i}", f"answer {i}", id=f"{prefix}-{i}") for i in range(count)]


def run(
    tmp_path: Path,
    renderer: Renderer,
    pool: list[Any],
    target: list[Any] | None,
    heldout: list[Any] | None = None,
    **more: Any,
) -> tuple[dict[str, Any], dict[str, Table], list[dict[str, Any]]]:
    """Counts, tables and dropped records."""
    seed = more.pop("seed", 0)
    config = DataSection(
        pool=[lines(tmp_path / "pool.jsonl", *pool)],
        target=target and [lines(tmp_path / "target.jsonl", *target)],
        heldout=[lines(tmp_path / "heldout.jsonl", *heldout)] if heldout else [],
        **more,
    )
    folder = tmp_path / "data"
    counts = prepare(config, renderer, folder, 0.3, seed)
    tables = {name: Table.read(folder / f"{name}.parquet") for name in ("pool", "target", "heldout")}
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert not list(folder.glob("*.part"))
    return counts, tables, dropped


def test_counts_tables_and_originals(tmp_path: Path, renderer: Renderer) -> None:
    pool = [
        pair("ä👋", "x", id=3, z=[1, {"b": None}], big=2**70, f=0.1, s=1e-07),
        pair("p2"),
        pair(" p2 "),
        *pairs("p", 3),
    ]
    counts, tables, dropped = run(tmp_path, renderer, pool, pairs("t", 10), pairs("h", 4), deduplicate="none")
    name = str(tmp_path / "pool.jsonl")
    assert counts["rows"] == {"pool": 6, "target": 10, "heldout": 4}
    assert (counts["dropped"], counts["distinct"], counts["leaks_kept"]) == ({}, 5, 0)
    assert counts["schemas"]["pool"] == {name: {"prompt/completion": 6}}
    assert counts["masks"] == "the chat template rendered turn by turn"
    assert dropped == []
    source = (tmp_path / "pool.jsonl").read_text().splitlines()
    assert [row.original for row in tables["pool"]] == source  # byte for byte
    assert [row.columns for row in tables["pool"]] == [json.loads(line) for line in source]
    assert [row.line for row in tables["pool"]] == [1, 2, 3, 4, 5, 6]
    row = tables["pool"][0]
    rendered = renderer([{"role": "user", "content": "ä👋"}, {"role": "assistant", "content": "x"}])
    assert (row.id, row.input_ids, row.labels) == ("3", rendered.input_ids, rendered.labels)


def test_drops_have_reasons_ids_and_places(tmp_path: Path, renderer: Renderer) -> None:
    pool = [
        *pairs("p", 4),
        pair("long " * 60, id="too-long"),
        {"id": "silent", "messages": [{"role": "user", "content": "x"}]},
        {"id": "odd", "messages": [{"role": "assistant", "content": "x"}]},
    ]
    counts, tables, dropped = run(tmp_path, renderer, pool, pairs("t", 4), max_tokens=64)
    assert tables["pool"].ids == ["p-0", "p-1", "p-2", "p-3"]
    assert [(d["split"], d["id"], d["line"]) for d in dropped] == [
        ("pool", "too-long", 5),
        ("pool", "silent", 6),
        ("pool", "odd", 7),
    ]
    assert [d["reason"] for d in dropped][:2] == ["longer than max_tokens", "no supervised token"]
    assert dropped[2]["reason"].startswith("the conversation begins with an assistant turn")
    assert all(d["source"].endswith("pool.jsonl") for d in dropped)
    assert sum(counts["dropped"].values()) == 3
    assert counts["dropped"]["pool: longer than max_tokens"] == 1


def test_rows_that_cannot_be_read_are_dropped_and_counted(tmp_path: Path, renderer: Renderer) -> None:
    bad = ["{broken\n", {"id": "empty", "messages": []}, pair("x", None), {"id": "typed", "text": 5}]  # type: ignore[arg-type]
    pool = [*pairs("p", 3), *bad, *pairs("q", 3)]
    counts, tables, dropped = run(tmp_path, renderer, pool, [*pairs("t", 4), {"id": "t-bad", "prompt": "only"}])
    assert tables["pool"].ids == [*(f"p-{i}" for i in range(3)), *(f"q-{i}" for i in range(3))]
    name = str(tmp_path / "pool.jsonl")
    assert [(d["split"], d["id"], d["line"]) for d in dropped] == [
        ("target", "t-bad", 5),
        ("pool", f"{name}:4", 4),
        ("pool", "empty", 5),
        ("pool", f"{name}:6", 6),
        ("pool", "typed", 7),
    ]
    assert {d["file"] for d in dropped if d["split"] == "pool"} == {name}
    assert dropped[1]["reason"].startswith("not valid JSON: Expecting")
    assert "at column" in dropped[1]["detail"]
    assert (dropped[4]["reason"], dropped[4]["detail"]) == ("'text' is int", "'text' is int; expected text")
    assert sum(counts["dropped"].values()) == 5
    assert counts["dropped"]["pool: 'text' is int"] == 1
    with pytest.raises(DataError, match=r"4 of 10 rows of the pool cannot be used .*pool\.jsonl:4\); fix the rows, or"):
        run(tmp_path, renderer, pool, pairs("t", 4), max_dropped=0.39)


def test_the_kinds_of_reasons_are_bounded(tmp_path: Path, renderer: Renderer) -> None:
    roles = [{"messages": [{"role": "x" + chr(97 + i // 26) + chr(97 + i % 26), "content": "x"}]} for i in range(120)]
    counts, _, dropped = run(tmp_path, renderer, [*pairs("p", 130), *roles], pairs("t", 4))
    assert len(dropped) == sum(counts["dropped"].values()) == 120
    assert len(counts["dropped"]) == 101
    assert counts["dropped"]["pool: other reasons"] == 20
    with pytest.raises(DataError, match="and 115 other reasons; first: "):
        run(tmp_path, renderer, [*pairs("p", 130), *roles], pairs("t", 4), max_dropped=0.1)


def test_rows_of_exactly_max_tokens_stay_whole(tmp_path: Path, renderer: Renderer) -> None:
    length = len(renderer([{"role": "user", "content": "p0"}, {"role": "assistant", "content": "answer 0"}]).input_ids)
    _, tables, _ = run(tmp_path, renderer, pairs("p", 3), pairs("t", 3), max_tokens=length)
    assert {len(row.input_ids) for row in tables["pool"]} == {length}
    with pytest.raises(DataError, match=r"3 of 3 rows of the target cannot be used \(3 × longer than max_tokens"):
        run(tmp_path, renderer, pairs("p", 3), pairs("t", 3), max_tokens=length - 1)


def test_leaks_are_dropped(tmp_path: Path, renderer: Renderer) -> None:
    pool = [*pairs("p", 3), pair("t1", "answer  1 ", id="leak-t"), pair("h0", "answer 0", id="leak-h")]
    target = [*pairs("t", 4), pair("h2", "answer 2", id="leak-in-target")]
    counts, tables, dropped = run(tmp_path, renderer, pool, target, pairs("h", 3))
    assert {d["id"]: d["reason"] for d in dropped} == {
        "leak-t": "same content as a row of target or heldout",
        "leak-h": "same content as a row of target or heldout",
        "leak-in-target": "same content as a row of heldout",
    }
    assert tables["pool"].ids == ["p-0", "p-1", "p-2"]
    assert tables["target"].ids == ["t-0", "t-1", "t-2", "t-3"]
    assert counts["rows"] == {"pool": 3, "target": 4, "heldout": 3}


def test_a_pool_of_leaks_alone(tmp_path: Path, renderer: Renderer) -> None:
    with pytest.raises(DataError, match="every row of the pool is also in target or heldout: nothing is left"):
        run(tmp_path, renderer, pairs("t", 4), pairs("t", 4))
    with pytest.raises(DataError, match="every row of the target is also in heldout"):
        run(tmp_path, renderer, pairs("p", 4), pairs("t", 4), pairs("t", 4))


@pytest.mark.parametrize("seed", range(5))
def test_split_keeps_copies_on_one_side_and_loses_nothing(tmp_path: Path, renderer: Renderer, seed: int) -> None:
    target = [pair(f" t{i % 6} ", f"answer {i % 6}", id=f"t-{i}") for i in range(24)]
    _, tables, dropped = run(tmp_path, renderer, pairs("p", 3), target, seed=seed)
    sides = {name: {row.hash for row in tables[name]} for name in ("target", "heldout")}
    assert not sides["target"] & sides["heldout"]
    assert sorted([*tables["target"].ids, *tables["heldout"].ids]) == sorted(row["id"] for row in target)
    assert len(sides["heldout"]) == 2  # 0.3 of 6 contents
    assert dropped == []


def test_split_depends_on_the_seed_and_on_content_not_on_order(tmp_path: Path, renderer: Renderer) -> None:
    def heldout(rows: list[Any], seed: int) -> set[str]:
        return set(run(tmp_path, renderer, pairs("p", 3), rows, seed=seed)[1]["heldout"].ids)

    rows = pairs("t", 20)
    assert heldout(rows, 0) == heldout(rows[::-1], 0)
    assert heldout(rows, 0) != heldout(rows, 1)
    assert len(heldout(rows, 0)) == 6


def test_a_pool_that_is_its_own_target(tmp_path: Path, renderer: Renderer) -> None:
    rows = [pair(f"p{i % 10}", f"answer {i % 10}", id=f"p-{i}") for i in range(20)]
    counts, tables, dropped = run(tmp_path, renderer, rows, None, deduplicate="none")
    assert counts["rows"] == {name: len(table) for name, table in tables.items()}
    assert counts["rows"] == {"pool": 14, "target": 0, "heldout": 6}
    sides = {name: {row.hash for row in tables[name]} for name in ("pool", "heldout")}
    assert not sides["pool"] & sides["heldout"], "copies stay together"
    assert sorted([*tables["pool"].ids, *tables["heldout"].ids]) == sorted(row["id"] for row in rows)
    assert (dropped, counts["distinct"]) == ([], 7)
    counts, tables, dropped = run(tmp_path, renderer, rows, None)
    assert counts["rows"] == {"pool": 7, "target": 0, "heldout": 3}
    assert {row.hash for row in tables["heldout"]} == sides["heldout"], "removed copies change nothing"
    assert counts["dropped"] == {"pool: duplicate": 10}
    counts, tables, dropped = run(tmp_path, renderer, rows[:10], None, [rows[3], pair("other")])
    assert counts["rows"] == {"pool": 9, "target": 0, "heldout": 2}
    assert [(d["id"], d["reason"]) for d in dropped] == [("p-3", "same content as a row of target or heldout")]
    with pytest.raises(DataError, match="the pool holds 1 distinct rows"):
        run(tmp_path, renderer, rows[:1], None)


def test_target_too_small_to_split(tmp_path: Path, renderer: Renderer) -> None:
    with pytest.raises(DataError, match=r"the target holds 1 distinct rows; .* give held-out rows .*data\.heldout"):
        run(tmp_path, renderer, pairs("p", 3), [pair("t"), pair(" t")])
    _, tables, _ = run(tmp_path, renderer, pairs("p", 3), pairs("t", 2))
    assert len(tables["target"]) == len(tables["heldout"]) == 1


def test_too_many_drops_are_an_error_with_the_first_place(tmp_path: Path, renderer: Renderer) -> None:
    pool = [*pairs("p", 2), pair("long " * 60), pair("longer " * 60), pair("longest " * 60)]
    message = r"3 of 5 rows of the pool cannot be used \(3 × longer than max_tokens; first: .*pool\.jsonl:3\); raise"
    with pytest.raises(DataError, match=message):
        run(tmp_path, renderer, pool, pairs("t", 4), max_tokens=64)
    counts, _, _ = run(tmp_path, renderer, pool, pairs("t", 4), max_tokens=64, max_dropped=0.6)
    assert counts["rows"]["pool"] == 2
    with pytest.raises(DataError, match="2 of 2 rows of the target cannot be used"):
        run(tmp_path, renderer, pairs("p", 2), pool[2:4], max_tokens=64, max_dropped=1.0)


def test_splits_without_files(tmp_path: Path, renderer: Renderer) -> None:
    file = lines(tmp_path / "a.jsonl", *pairs("p", 3))
    for pool, target, name in (([], [file], "pool"), ([file], [], "target")):
        with pytest.raises(DataError, match=rf"data\.{name} names no file"):
            prepare(DataSection(pool=pool, target=target), renderer, tmp_path / "d", 0.3, 0)
    empty = lines(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no examples"):
        prepare(DataSection(pool=[file], target=[empty]), renderer, tmp_path / "d", 0.3, 0)
    assert not (tmp_path / "d").exists()


def test_same_input_same_bytes(tmp_path: Path, renderer: Renderer) -> None:
    run(tmp_path, renderer, pairs("p", 5), pairs("t", 5))
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    run(tmp_path, renderer, pairs("p", 5), pairs("t", 5))
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before
    assert set(before) == {"pool.parquet", "target.parquet", "heldout.parquet", "dropped.jsonl"}


ROWS = [
    Row("a", "h1", "s", 1, '{"x": "ä"}', [1, 2, 3], [-100, 2, 3]),
    Row("b", "h2", "s", 2, "{}", [4], [4]),
    Row("c", "h3", "s", 3, "{}", [], []),
]


def test_table_round_trip(tmp_path: Path) -> None:
    Table(ROWS).write(tmp_path / "t.parquet")
    read = Table.read(tmp_path / "t.parquet")
    assert list(read) == ROWS
    assert read.ids == ["a", "b", "c"]
    assert read.take([2, 0]).ids == ["c", "a"]
    assert read[0].columns == {"x": "ä"}
    Table([]).write(tmp_path / "e.parquet")
    assert len(Table.read(tmp_path / "e.parquet")) == 0


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(RunError, match="not there; the data stage has not been run"):
        Table.read(path)
    Table(ROWS).write(path)
    whole = path.read_bytes()
    for content in (b"", b"not parquet at all", whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"t\.parquet: not a readable table"):
            Table.read(path)
    pq.write_table(pa.table({"id": ["a"], "text": ["x"]}), path)
    with pytest.raises(RunError, match="not a table of examples: its columns are id, text"):
        Table.read(path)
    good = pa.table({name: [getattr(row, name) for row in ROWS] for name in ROWS[0].__dataclass_fields__})
    pq.write_table(good.set_column(3, "line", pa.array(["x", "y", "z"])), path)
    with pytest.raises(RunError, match="not a readable table"):
        Table.read(path)
