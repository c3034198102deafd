"""Copies and leaks: what is one, what happens to it, and what is written down about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_data_prepare import lines, pair, pairs, renderer, run  # noqa: F401

from gradpursuit.config import DataSection
from gradpursuit.data import Renderer, Table, left_out, prepare_target
from gradpursuit.data.duplicates import text_hash
from gradpursuit.data.leakage import Leak, Leaks, Protected
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


COPIES = [*pairs("p", 3), pair("P1 ", "ANSWER\n1", id="copy"), pair("p1", "answer 1", id="third"), pair("p1", "no")]


def test_exact_copies_have_the_same_tokens(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    counts, tables, dropped = run(tmp_path, renderer, COPIES, pairs("t", 4))
    assert len(tables["pool"]) == 5
    assert [(d["id"], d["reason"], d["duplicate_of"]) for d in dropped] == [("third", "duplicate", "p-1")]
    assert (counts["dropped"], counts["distinct"]) == ({"pool: duplicate": 1}, 4)


def test_the_first_of_folded_copies_stays(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    counts, tables, dropped = run(tmp_path, renderer, COPIES, pairs("t", 4), deduplicate="folded")
    assert tables["pool"].ids[:3] == ["p-0", "p-1", "p-2"]
    assert len(tables["pool"]) == counts["distinct"] == 4
    reason = "duplicate up to case and white space"
    assert drops(dropped) == {"copy": reason, "third": reason}
    assert {record["duplicate_of"] for record in dropped} == {"p-1"}
    assert counts["dropped"] == {f"pool: {reason}": 2}


@pytest.mark.parametrize("deduplicate", ["exact", "folded", "none"])
def test_rows_that_differ_in_case_are_leaks_and_stay_together(
    tmp_path: Path,
    renderer: Renderer,  # noqa: F811
    deduplicate: str,
) -> None:
    rows = [pair(word, "x", id=word) for i in range(6) for word in (f"word {i}", f"WORD  {i}")]
    _, tables, _ = run(tmp_path, renderer, [*rows[:4], pair("other")], rows[4:], deduplicate=deduplicate)
    sides = [{name.lower().split()[1] for name in tables[split].ids} for split in ("target", "heldout")]
    assert not sides[0] & sides[1]
    _, tables, dropped = run(tmp_path, renderer, rows[1::2], rows[:4:2], rows[4:8:2], deduplicate=deduplicate)
    assert tables["pool"].ids == ["WORD  4", "WORD  5"]
    assert set(drops(dropped).values()) == {"same content as a row of target or heldout"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "def f(x):\n    if x:\n        return 1\n    return 2",
            "def f(x):\n    if x:\n        return 1\n        return 2",
        ),
        ("Polish", "polish"),
        ("TIDE TABLE", "tide table"),
        ("f ( x )", "f(x)"),
    ],
)
def test_what_differs_is_no_exact_copy(tmp_path: Path, renderer: Renderer, one: str, other: str) -> None:  # noqa: F811
    pool = [pair("Say it.", one, id="one"), pair("Say it.", other, id="other")]
    assert len(run(tmp_path, renderer, pool, pairs("t", 4))[1]["pool"]) == 2
    assert len(run(tmp_path, renderer, pool, pairs("t", 4), deduplicate="folded")[1]["pool"]) == 1


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
        tmp_path, renderer, pool[1:], target, pairs("h", 2), deduplicate="near", near_threshold=0.6, leak_coverage=None
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
    assert leaks.find(text_hash("|".join((QUESTION, "At three."))), said("x", "y")) == Leak(
        "long", "same content as a row of"
    )
    assert leaks.find("0", said(QUESTION, "Another answer.")) == Leak("long", holds)
    assert leaks.find("0", said(f"Think. {QUESTION.upper()} Go!", "x")) == Leak("long", holds)
    assert leaks.find("0", said("Hi", "Hello", "What is 3 times 4?", "it is TWELVE")) == Leak("short", holds)
    assert leaks.find("0", Conversation(text=f"Once: {QUESTION} The end.")) == Leak("long", holds)
    assert leaks.find("0", said("What is 3 times 4?", "No idea.")) is None  # a short question alone is nobody's own
    assert leaks.find("0", said(QUESTION.replace("Oslo", "Voss"), "x")) is None
    assert leaks.find("0", said("pre" + QUESTION, "x")) is None  # whole words
    assert Leaks([]).find("0", said(QUESTION, "x")) is None


def test_an_instruction_that_protected_rows_share_is_no_leak() -> None:
    rows = [protected(str(i), QUESTION, f"Answer number {i}.") for i in range(2)]
    assert Leaks(rows).find("0", said(QUESTION, "Something else.")) is None
    assert Leaks(rows[:1], rows[1:]).find("0", said(QUESTION, "Something else.")) is None
    assert Leaks(rows).find("0", said(QUESTION, "Answer number 1.")) == Leak("1", "holds the text of a row of")


def test_a_part_of_a_row_is_a_leak_by_its_runs_of_eight_words() -> None:
    ten, part = "a b c d e f g h i j", "z b c d e f g h i z"
    rows = [protected("ten", ten, "x")]
    assert Leaks(rows, coverage=0.5).find("0", said(part, "y")) == Leak("ten", "holds a part of a row of", 0.8)
    assert Leaks(rows, coverage=0.8).find("0", said(part, "y")) is not None
    assert Leaks(rows, coverage=0.81).find("0", said(part, "y")) is None
    assert Leaks(rows).find("0", said(part, "y")) is None
    assert Leaks(rows, coverage=0.5).find("0", said("b c d e f g h z i", "y")) is None  # runs of seven
    assert Leaks(rows, coverage=0.5).find("0", said(ten, "y")) == Leak("ten", "holds the text of a row of")


def test_an_instruction_that_rows_share_covers_nothing() -> None:
    instruction = "Read the story below with care and answer the question after it in one single word."
    rows = [protected(str(i), f"{instruction} {story}", "x") for i, story in enumerate(("Ann ran.", "Bob sat."))]
    leaks = Leaks(rows, coverage=0.3)
    assert leaks.find("0", said(f"{instruction} Cid ate.", "y")) is None
    third = protected("2", f"{instruction} Cid ate.", "x")
    assert Leaks(rows[:1], [rows[1], third], 0.3).find(third.hash, third.conversation) is None
    assert Leaks(rows[:1], [third], 0.3).find(third.hash, third.conversation) is not None  # shared by the two alone
    assert Leaks(rows[:1], (), 0.3).find("0", said(f"{instruction} Cid ate.", "y")) is not None
    assert leaks.find("0", said(f"{instruction} Ann ran.", "y")) == Leak("0", "holds the text of a row of")


def test_parts_are_dropped_with_their_share(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    pool = [*pairs("p", 3), pair(QUESTION.replace("Oslo", "Voss"), "x", id="part")]
    target = [pair(QUESTION, "At three.", id="secret"), *pairs("t", 3)]
    _, tables, dropped = run(tmp_path, renderer, pool, target, pairs("h", 2))
    assert tables["pool"].ids == ["p-0", "p-1", "p-2"]
    (record,) = dropped
    assert (record["reason"], record["leaks"]) == ("holds a part of a row of target or heldout", "secret")
    assert record["coverage"] == round(16 / 17, 3)
    _, tables, dropped = run(tmp_path, renderer, pool, target, pairs("h", 2), leak_coverage=None)
    assert (len(tables["pool"]), dropped) == (4, [])
    target[1] = pair(f"Now: {QUESTION.replace('Oslo', 'Voss')}", "x", id="near")
    _, tables, dropped = run(tmp_path, renderer, pairs("p", 3), target[1:], [target[0], *pairs("h", 2)])
    assert drops(dropped) == {"near": "holds a part of a row of heldout"}


def test_an_instruction_that_the_pool_shares_is_no_leak(tmp_path: Path, renderer: Renderer) -> None:  # noqa: F811
    """One protected row of a task whose instruction every pool row of the task begins with."""
    instruction = "For the given proverb in English give a proverb in Russian which is close to it in meaning."
    pool = [pair(f"{instruction} Number {i}", f"a{i}", id=f"p-{i}") for i in range(21)]
    pool.insert(2, pair(QUESTION.replace("Oslo", "Voss"), "x", id="part"))
    target = [pair(f"{instruction} Pigs might fly", "x"), pair(QUESTION, "At three."), *pairs("t", 2)]
    counts, tables, dropped = run(tmp_path, renderer, pool, target, pairs("h", 2))
    assert drops(dropped) == {"part": "holds a part of a row of target or heldout"}
    assert tables["pool"].ids == [f"p-{i}" for i in range(21)]
    assert counts["rows"]["pool"] == 21
    _, tables, dropped = run(tmp_path, renderer, [*pool[:21], pair("q", "a", id="other")], target, pairs("h", 2))
    assert (tables["pool"].ids, len(dropped)) == (["other"], 21)  # what twenty share may be one secret


def test_a_plain_text_target_leaks_as_a_whole() -> None:
    leaks = Leaks([Protected("t", "1", Conversation(text=QUESTION))])
    assert leaks.find("0", said("Quote it.", QUESTION)) == Leak("t", "holds the text of a row of")


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
