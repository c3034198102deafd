from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradpursuit.errors import RunError
from gradpursuit.evaluation.journal import Journal, Result


def result(training: str, loss: float = 1.5, correct: list[bool] | None = None) -> Result:
    return Result(training, "rows", {"strategy": "gtp"}, 3, [loss, 0.1], [True, False], correct, 2.0, 0.5, "CPU")


def test_results_come_back_and_the_last_one_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "evaluation" / "results.jsonl")
    assert journal.get("a", "rows") is None
    for one in (result("a"), result("b", 1 / 3), result("a", 7.0, [True, True])):
        journal.add(one)
    again = Journal(tmp_path / "evaluation" / "results.jsonl")
    assert again.get("b", "rows") == result("b", 1 / 3)
    assert again.get("a", "rows") == result("a", 7.0, [True, True])
    assert again.get("a", "other rows") is None
    assert again.get("a", "rows", accuracy=True) is not None
    assert again.get("b", "rows", accuracy=True) is None


def test_torn_and_changed_lines_are_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "results.jsonl"
    journal = Journal(path)
    for name in "abc":
        journal.add(result(name))
    lines = path.read_text().splitlines()
    changed = json.loads(lines[1])
    changed["result"]["losses"][0] = 0.01
    path.write_text("\n".join([lines[0], json.dumps(changed), lines[2][:-30]]))
    again = Journal(path)
    assert [again.get(name, "rows") is not None for name in "abc"] == [True, False, False]
    assert f"{path}:2 and 1 more lines: torn or changed, passed over" in caplog.text, "in one warning"
    assert len(caplog.records) == 1
    again.add(result("b"))
    last = Journal(path)
    assert [last.get(name, "rows") is not None for name in "abc"] == [True, True, False]


def test_a_full_disk_is_told(small_disk: Path) -> None:
    journal = Journal(small_disk / "results.jsonl")

    def fill() -> None:
        for number in range(10_000):
            journal.add(result(str(number)))

    with pytest.raises(RunError, match="no space left"):
        fill()
    assert Journal(small_disk / "results.jsonl").get("0", "rows") == result("0")
