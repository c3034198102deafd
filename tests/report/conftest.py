"""Finished runs whose data are as hostile as data can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradpursuit.cli import main
from jobs import Job

EVIL = "<script>document.title = 'broken'</script><img src=http://127.0.0.1:9/x onerror=\"document.title = 'broken'\">"


def hostile(row: dict[str, Any]) -> dict[str, Any]:
    """The row with markup in every text, its id and a column of the user's own."""
    return {
        **row,
        "id": f"{row['id']}\"'><b>{EVIL}",
        "prompt": f"{row['prompt']} {EVIL} </td></table>",
        "completion": f"{row['completion']} </script>",
        "topic": f"{row['topic']}{EVIL}",
    }


@pytest.fixture(scope="session")
def evil() -> str:
    """What stands in every text of the data."""
    return EVIL


@pytest.fixture(scope="session")
def finished(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A whole run on hostile rows, with a dropped row, copies and an added target; its report is of all that."""
    job = Job(tmp_path_factory.mktemp("report"), tiny_path)
    pool = [hostile({**job.row(i), "topic": ("sums", "more")[i % 2]}) for i in range(30)]
    pool += [{**row, "id": f"copy of {row['id']}"} for row in pool[:10]]
    pool.append(hostile({**job.row(99), "prompt": "long " * 400}))
    name = "pool <b>&.jsonl"
    job.write(name, pool)
    for split, start, word in (("target", 0, "times"), ("heldout", 6, "times"), ("other", 40, "minus")):
        job.write(f"{split}.jsonl", [hostile(job.row(i, word)) for i in range(start, start + 6)])
    job.save(data={"pool": str(job.folder / name), "max_tokens": 400}, selection={"k": 8})
    assert main(["run", str(job.path), "--quiet"]) == 0
    added = ["--name", "other", "--file", str(job.folder / "other.jsonl")]
    assert main(["target", "add", str(job.run_dir), *added, "--quiet"]) == 0
    assert main(["report", str(job.run_dir), "--quiet"]) == 0
    return job


@pytest.fixture(scope="session")
def report(finished: Job) -> dict[str, Any]:
    """Its `report.json`."""
    found: dict[str, Any] = json.loads((finished.run_dir / "report.json").read_text("utf-8"))
    return found


@pytest.fixture(scope="session")
def page(finished: Job) -> Path:
    """Its `report.html`."""
    return finished.run_dir / "report.html"
