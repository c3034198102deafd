"""`gradpursuit inspect`: what it shows, that it loads no weights, and that data cannot steer the terminal."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from gradpursuit.cli import main
from jobs import Job

TEMPLATE_HEAD = "<|im_start|>user\n"


@pytest.fixture
def job(tiny_path: Path, tmp_path: Path) -> Job:
    """A job whose model has no weights any more."""
    model = tmp_path / "model"
    shutil.copytree(tiny_path, model, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    made = Job(tmp_path, model)
    rows = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text().splitlines()]
    rows += [
        {"messages": [{"role": "user", "content": "Hi"}], "id": "silent", "topic": "x"},
        {"id": "leak", "prompt": "Tell me: what is 3 times 3?", "completion": "It is 9.", "topic": "times"},
        {"id": "evil", "prompt": "[bold]x[/bold] \x1b[2J", "completion": "[red]y", "topic": "x"},
    ]
    made.write("pool.jsonl", rows)
    made.save(data={"deduplicate": "exact"})
    return made


def as_json(job: Job, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["inspect", str(job.path), "--json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_counts(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(job, capsys, "--n", "4")
    assert found["rows"] == {"pool": 31, "target": 6, "heldout": 6}
    pool = str(job.folder / "pool.jsonl")
    assert found["sources"]["pool"] == {pool: {"prompt/completion": 33, "messages": 1}}
    dropped = {(drop["split"], drop["reason"]): (drop["rows"], drop["first"]) for drop in found["dropped"]}
    assert dropped == {
        ("pool", "duplicate"): (1, f"{pool}:31"),
        ("pool", "no supervised token"): (1, f"{pool}:32"),
        ("pool", "holds the text of a row of target or heldout"): (1, f"{pool}:33"),
    }
    assert (found["copies"], found["distinct"], found["leaks_kept"]) == (1, 31, 0)
    assert found["clusters"] == [{"id": "plus-3", "copies": 1}]
    assert found["leaks"] == [{"id": "leak", "place": f"{pool}:33", "leaks": "times-3"}]
    lengths, supervised = found["tokens"]["pool"], found["supervised"]["pool"]
    assert 0 < supervised["min"] < lengths["min"] <= lengths["median"] <= lengths["95 %"] <= lengths["max"]
    assert 31 * lengths["min"] < lengths["total"] < 31 * lengths["max"]
    assert not job.run_dir.exists()


def test_rows_are_what_the_model_sees(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(job, capsys, "--n", "2")
    assert [row["split"] for row in found["shown"]] == ["pool", "pool", "target", "target"]
    assert [row["id"] for row in found["shown"]] == ["plus-0", "evil", "times-0", "times-5"]
    first = found["shown"][0]
    (head, answer, end) = first["segments"]
    assert head[1].endswith("<|im_start|>user\nWhat is 0 plus 0?<|im_end|>\n<|im_start|>assistant\n")
    assert (head[0], answer, end) == (False, [True, "It is 0.<|im_end|>"], [False, "\n"])
    full = as_json(job, capsys, "--n", "1", "--data.turns", "full")
    assert (full["turns"], len(full["shown"][0]["segments"])) == ("full", 1)
    assert as_json(job, capsys, "--n", "0", "--data.deduplicate", "none")["copies"] == 1


def test_printed_without_colour_the_supervised_text_is_marked(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(job.path), "--n", "100"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out  # no colour in a pipe, and none out of the data
    assert "What is 5 plus 5?<|im_end|>\n<|im_start|>assistant\n⟦It is 15.<|im_end|>⟧" in out
    assert "[bold]x[/bold] \\x1b[2J" in out
    assert "⟦[red]y<|im_end|>⟧" in out
    assert out.count("⟦It is") == 30 + 6
    for part in ("Sources", "no supervised token", "1 exact copies in the pool are removed", "leak holds times-3"):
        assert part in out
    assert re.search(r"pool\s+│\s+31 │", out)


def test_colours_on_a_terminal_unless_refused(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["inspect", str(job.path), "--n", "1"]) == 0
    assert re.search("\x1b\\[1;32mIt is 0.<|im_end|>", capsys.readouterr().out)
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["inspect", str(job.path), "--n", "1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[1;32m" not in out
    assert "⟦" in out


def test_a_pool_that_is_its_own_target(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.target", "pool", "--data.heldout", "[]", "--n", "2"]
    found = as_json(job, capsys, *flags)
    assert (found["rows"]["target"], found["rows"]["pool"] + found["rows"]["heldout"]) == (0, 32)
    assert (list(found["sources"]), [row["split"] for row in found["shown"]]) == (["pool"], ["pool", "pool"])
    assert main(["inspect", str(job.path), *flags]) == 0
    printed = capsys.readouterr()
    assert re.search(r"target\s+│\s+0 │", printed.out)
    assert f"{found['rows']['heldout']} of 32 pool rows are set aside for scoring" in printed.err


def test_bad_input_is_told(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    (job.folder / "target.jsonl").write_text('{"prompt": 5}\n')
    assert main(["inspect", str(job.path)]) == 2
    assert "target.jsonl:1: columns found: 'prompt'" in capsys.readouterr().err
    assert main(["inspect", str(job.path), "--selection.strategies", "gpt"]) == 2
    assert "unknown strategy 'gpt'; did you mean 'gtp'?" in capsys.readouterr().err
    job.write("pool.jsonl", [{"prompt": "a", "completion": "b", "weight": 1.0}])
    job.write("target.jsonl", [{"prompt": f"q{i}", "completion": "b"} for i in range(3)])
    assert main(["inspect", str(job.path)]) == 2
    assert (
        "pool.jsonl:1: the column 'weight' is also the name of a column that the export adds" in capsys.readouterr().err
    )
    for flag in ("-1", "x"):
        with pytest.raises(SystemExit):
            main(["inspect", str(job.path), "--n", flag])


def test_what_is_not_read_is_named(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}.", "context": f"Sums {i}."} for i in range(4)]
    job.write("pool.jsonl", rows)
    note = "column 'context' holds text and is not read; put it into the conversation if it belongs there"
    assert as_json(job, capsys)["notes"] == {"target": {}, "heldout": {}, "pool": {note: 4}}
    assert main(["inspect", str(job.path)]) == 0
    printed = capsys.readouterr()
    assert f"note: pool: {note} (4 rows)" in " ".join(printed.out.split())
    assert f"warning: pool: {note} (4 rows)" in printed.err
    assert main(["inspect", str(job.path), "--data.columns", "{input: null}"]) == 0
