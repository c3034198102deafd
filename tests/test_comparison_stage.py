"""`gradpursuit compare`: budgets, protocols and targets of a run, by its configuration and by flags."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from gradpursuit.cli import main
from gradpursuit.evaluation import compare
from jobs import Job


@pytest.fixture(scope="module")
def template(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run whose selection is exported, with another target."""
    job = Job(tmp_path_factory.mktemp("template"), tiny_path)
    job.save(evaluation={"steps": 2, "seeds": 1, "batch_size": 2})
    for verb in ("warmup", "collect", "select", "export"):
        assert main([verb, str(job.path)]) == 0
    job.write("other.jsonl", [job.row(i, "minus") for i in range(9)])
    assert main(["target", "add", str(job.run_dir), "--name", "other", "--file", str(job.folder / "other.jsonl")]) == 0
    return job


@pytest.fixture
def run(template: Job, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template.run_dir, tmp_path / "run"))


def cells(run: Path) -> list[dict[str, str]]:
    with (run / "evaluation" / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_budgets_protocols_targets_and_end_points(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--evaluation.budgets", "[3, 0.2]", "--evaluation.protocols", "equal-steps,equal-epochs"]
    arguments += ["--evaluation.strategies", "gtp,random", "--evaluation.epochs", "1"]
    assert main(["compare", str(run), "--targets", "own,other", *arguments]) == 0
    found = cells(run)
    assert len(found) == 2 * (1 + 2 * (2 * 2 + 1)), "targets × (base + protocols × (strategies × k + full))"
    assert {row["budget"] for row in found} == {"", "3", "7"}, "0.2 of 31 rows, rounded up"
    assert {(row["protocol"], row["budget"], row["steps"]) for row in found if row["strategy"] == "gtp"} == {
        ("equal-steps", "3", "2"),
        ("equal-steps", "7", "2"),
        ("equal-epochs", "3", "2"),
        ("equal-epochs", "7", "4"),
    }
    shared = {row["training"] for row in found if row["strategy"] == "random"}
    assert len(shared) == 3, "the same for both targets, and 3 rows take 2 steps by either protocol"
    with (run / "evaluation" / "differences.csv").open(encoding="utf-8") as file:
        differences = list(csv.DictReader(file))
    assert {row["target"] for row in differences} == {"own", "other", "all targets"}
    assert {row["other"] for row in differences} == {"random", "full", "base"}
    assert (run / "evaluation" / "table.md").is_file()
    page = (run / "report.html").read_text("utf-8")
    assert "Did it help?" in page
    assert "held-out loss, before" not in page, "the budget of the selection, 5, was not compared"
    done: list[int] = []
    monkeypatch.setattr(compare, "train", lambda *args, **more: done.append(1))
    assert main(["compare", str(run), "--targets", "other"]) == 0
    assert {row["target"] for row in cells(run)} == {"other"}
    assert done == [], "config.yaml remembers the rest, and every cell is known"


def test_the_exported_subset_is_the_one_that_is_compared(run: Path) -> None:
    assert main(["compare", str(run)]) == 0
    assert not (run / "evaluation" / "selections").exists()
    report = json.loads((run / "report.json").read_text())
    assert [line["strategy"] for line in report["comparison"]["rows"]] == ["gtp", "less", "random", "full"]
    assert {line["steps"] for line in report["comparison"]["rows"]} == {2}


def test_some_strategies_alone_and_the_first_is_the_reference(run: Path) -> None:
    assert main(["compare", str(run), "--evaluation.strategies", "less,gtp", "--evaluation.endpoints", "[]"]) == 0
    assert [row["strategy"] for row in cells(run)] == ["less", "gtp"]
    text = (run / "evaluation" / "differences.csv").read_text()
    assert ",less,5,gtp,5," in text
    assert ",gtp,5," not in text.replace(",less,5,gtp,5,", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evaluation.budgets", "40"], "evaluation.budgets: 40 examples, but only 31 of the pool can be chosen for"),
        (["--targets", "nobody"], "target 'nobody': the run has no such target (added: other)"),
        (["--targets", "own,own"], "'evaluation.targets' = ['own', 'own']: an entry is listed twice"),
        (["--evaluation.strategies", "omp"], "evaluation.strategies: omp not among selection.strategies (gtp, less"),
        (["--evaluation.budgets", "1.5"], "a count of examples is at least 1, a share of the pool above 0"),
        (["--evaluation.budgets", "[true]"], "expected a count of examples, such as 50, or a share of the pool"),
        (["--evaluation.protocols", "equal-time"], "'equal-time'"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_changes_nothing(
    run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    before = (run / "config.yaml").read_bytes()
    assert main(["compare", str(run), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert (run / "config.yaml").read_bytes() == before
    assert not (run / "evaluation").exists()
