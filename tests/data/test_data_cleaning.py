"""Copies and leaks: what is one, what happens to it, and what is written down about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_data_prepare import lines, pair, pairs, renderer, run  # noqa: F401

from gradpursuit.config import DataSection
from gradpursuit.data import Renderer, Table, left_out, prepare_target
from gradpursuit.data.duplicates import text_hash
from gradpursuit.data.leakage import Leaks, Protected
from gradpursuit.data.schemas import Conversation
from gradpursuit.errors import DataError

QUESTION = "A train leaves Bergen at nine and drives eighty kilometres an hour; when is it in Oslo?"


def drops(dropped: list[dict[str, Any]]) -> dict[str, str]:
    return {record["id"]: record["reason"] for record in dropped}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Add 1 2 to 3", " add  1\n2 TO\t3 ", True),
        ("x = 1", "x=1", True),
        ("STRASSE", "straße", True),
        ("Add 12 3", "Add 1 23", False),
        ("now here", "nowhere", False),
        ("a", "b", False),
    ],
)
def test_white_space_and_case_are_folded(one: str, other: str, same: bool) -> None:
    assert (text_hash(one) == text_hash(other)) is same


def test_the_first_of_exact_copies_stays(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    pool = [*pairs("p", 3), pair("P1 ", "ANSWER\n1", id="copy"), pair("p1", "answer 1", id="third"), pair("p1", "no")]
    counts, tables, dropped = run(tmp_path, renderer, pool, pairs("t", 4))
    assert tables["pool"].ids[:3] == ["p-0", "p-1", "p-2"]
    assert len(tables["pool"]) == counts["distinct"] == 4
    assert drops(dropped) == {"copy": "duplicate", "third": "duplicate"}
    assert {record["duplicate_of"] for record in dropped} == {"p-1"}
    assert counts["dropped"] == {"pool: duplicate": 2}


def test_copies_are_kept_if_asked(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    counts, tables, dropped = run(
        tmp_path, renderer, [*pairs("p", 3), pair("p1", "answer 1")], pairs("t", 4), deduplicate="none"
    )
    assert (len(tables["pool"]), counts["distinct"], dropped) == (4, 3, [])
    assert tables["pool"][3].hash == tables["pool"][1].hash


def test_copies_are_no_unusable_rows_and_those_of_the_target_stay(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    pool = [pair("p", "same", id=str(i)) for i in range(10)]
    counts, tables, _ = run(tmp_path, renderer, pool, [*pairs("t", 4), pair("t1", "answer 1")], max_dropped=0.1)
    assert counts["rows"]["pool"] == 1
    assert len(tables["target"]) + len(tables["heldout"]) == 5


def test_near_copies_by_minhash(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    pool = [
        pair(QUESTION, "At three in the afternoon.", id="first"),
        pair(f"Question: {QUESTION}", "At three in the afternoon", id="near"),
        pair("What is the capital of Norway, and when did it become that?", "Oslo, in 1814.", id="other"),
        pair("short", "x", id="short"),
        pair("shorter", "x", id="shorter"),
    ]
    _, tables, dropped = run(tmp_path, renderer, pool, pairs("t", 4), deduplicate="near")
    assert tables["pool"].ids == ["first", "other", "short", "shorter"]
    assert [(d["id"], d["reason"], d["duplicate_of"]) for d in dropped] == [("near", "near duplicate", "first")]
    _, tables, _ = run(tmp_path, renderer, pool, pairs("t", 4), deduplicate="near", near_threshold=0.97)
    assert len(tables["pool"]) == 5
    _, tables, _ = run(tmp_path, renderer, pool, pairs("t", 4))
    assert len(tables["pool"]) == 5  # exact copies alone, unless asked
    target = [pair(f"{QUESTION} Round down.", "At three in the afternoon.", id="t"), *pairs("t", 4)]
    _, tables, dropped = run(
        tmp_path, renderer, pool[1:], target, pairs("h", 2), deduplicate="near", near_threshold=0.6
    )
    assert (drops(dropped), dropped[0]["leaks"]) == ({"near": "near duplicate of a row of target or heldout"}, "t")


def said(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts)))


def protected(name: str, *texts: str) -> Protected:
    return Protected(name, text_hash("|".join(texts)), said(*texts))


def test_what_leaks() -> None:
    leaks = Leaks([protected("long", QUESTION, "At three."), protected("short", "What is 3 times 4?", "It is twelve.")])
    holds = "holds the text of a row of"
    assert leaks.find(text_hash("|".join((QUESTION, "At three."))), said("x", "y")) == (
        "long",
        "same content as a row of",
    )
    assert leaks.find("0", said(QUESTION, "Another answer.")) == ("long", holds)
    assert leaks.find("0", said(f"Think. {QUESTION.upper()} Go!", "x")) == ("long", holds)
    assert leaks.find("0", said("Hi", "Hello", "What is 3 times 4?", "it is TWELVE")) == ("short", holds)
    assert leaks.find("0", Conversation(text=f"Once: {QUESTION} The end.")) == ("long", holds)
    assert leaks.find("0", said("What is 3 times 4?", "No idea.")) is None  # a short question alone is nobody's own
    assert leaks.find("0", said(QUESTION.replace("Oslo", "Voss"), "x")) is None
    assert leaks.find("0", said("pre" + QUESTION, "x")) is None  # whole words
    assert Leaks([]).find("0", said(QUESTION, "x")) is None


def test_an_instruction_that_protected_rows_share_is_no_leak() -> None:
    rows = [protected(str(i), QUESTION, f"Answer number {i}.") for i in range(2)]
    assert Leaks(rows).find("0", said(QUESTION, "Something else.")) is None
    assert Leaks(rows[:1], rows[1:]).find("0", said(QUESTION, "Something else.")) is None
    assert Leaks(rows).find("0", said(QUESTION, "Answer number 1.")) == ("1", "holds the text of a row of")


def test_a_plain_text_target_leaks_as_a_whole() -> None:
    leaks = Leaks([Protected("t", "1", Conversation(text=QUESTION))])
    assert leaks.find("0", said("Quote it.", QUESTION)) == ("t", "holds the text of a row of")


def test_leaks_are_removed_and_listed_or_kept_and_counted(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    pool = [*pairs("p", 3), pair(f"Please: {QUESTION}", "x", id="leak")]
    target = [pair(QUESTION, "At three.", id="secret"), *pairs("t", 3)]
    counts, tables, dropped = run(tmp_path, renderer, pool, target, pairs("h", 2))
    assert tables["pool"].ids == ["p-0", "p-1", "p-2"]
    assert drops(dropped) == {"leak": "holds the text of a row of target or heldout"}
    assert (dropped[0]["leaks"], dropped[0]["line"], counts["leaks_kept"]) == ("secret", 4, 0)
    counts, tables, dropped = run(tmp_path, renderer, pool, target, pairs("h", 2), leaks="keep")
    assert (len(tables["pool"]), dropped, counts["leaks_kept"]) == (4, [], 1)


def test_a_target_row_that_holds_a_held_out_question_is_removed(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    target = [pair(f"Hm. {QUESTION}", "At two.", id="leak"), *pairs("t", 3)]
    _, tables, dropped = run(tmp_path, renderer, pairs("p", 3), target, [pair(QUESTION, "At three."), *pairs("h", 2)])
    assert drops(dropped) == {"leak": "holds the text of a row of heldout"}
    assert "leak" not in tables["target"].ids


def test_a_target_that_is_added_later_rules_pool_rows_out(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    pool = lines(
        tmp_path / "own.jsonl", *({"q": f"{QUESTION} {i}" if i == 2 else f"q{i}", "a": "x", "id": i} for i in range(4))
    )
    target = lines(tmp_path / "t.jsonl", pair(QUESTION, "At three."), *pairs("t", 3))
    mapped = {"path": str(tmp_path / "ow*.jsonl"), "columns": {"prompt": "q", "completion": "a"}}
    config = DataSection.model_validate({"pool": mapped, "target": target})
    table = Table.read(_prepared(tmp_path, renderer, mapped))
    Path(pool).unlink()  # its rows are clean: the file is needed no more
    (tmp_path / "late").mkdir()
    counts = prepare_target(config, table, renderer, tmp_path / "late", 0.3, 0)
    assert left_out(tmp_path / "late") == {"2"}
    assert counts["leaks"] == 1
    kept = config.model_copy(update={"leaks": "keep"})
    assert prepare_target(kept, table, renderer, tmp_path / "late", 0.3, 0)["leaks"] == 0
    assert left_out(tmp_path / "late") == set()
    with pytest.raises(DataError, match="every row of the pool is also in target or heldout"):
        prepare_target(config, table.take([2]), renderer, tmp_path / "late", 0.3, 0)


def _prepared(tmp_path: Path, renderer: Renderer, pool: Any) -> Path:  # noqa: F811
    from gradpursuit.data import prepare

    target = lines(tmp_path / "first.jsonl", *pairs("f", 4))
    prepare(DataSection.model_validate({"pool": pool, "target": target}), renderer, tmp_path / "data", 0.3, 0)
    return tmp_path / "data" / "pool.parquet"


def test_a_table_on_disk_is_read_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradpursuit.data import Row

    monkeypatch.setattr("gradpursuit.data.table.GROUP", 3)
    monkeypatch.setattr("gradpursuit.data.table._HELD", 2)
    rows = [Row(str(i), f"h{i}", "s", i, "{}", list(range(i)), [-100] * i, "f") for i in range(20)]
    Table(rows).write(tmp_path / "t.parquet")
    table = Table.read(tmp_path / "t.parquet")
    assert list(table) == rows
    assert table[-1] == rows[-1]
    assert table[3:9:2] == rows[3:9:2]
    order = [19, 0, 7, 7, 3, 18]
    taken = table.take(order)
    assert list(taken) == [taken[i] for i in range(6)] == [rows[i] for i in order]
    assert taken.ids == [str(i) for i in order]
    assert taken.take([5, 0]).ids == ["18", "19"]
    assert table.column("line") == list(range(20))
    with pytest.raises(IndexError):
        table[20]
    taken.write(tmp_path / "u.parquet")
    assert list(Table.read(tmp_path / "u.parquet")) == list(taken)
