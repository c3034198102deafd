from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gradpursuit.cli import main
from gradpursuit.counting import finished_rows
from gradpursuit.live import NAME, read_progress, telling
from gradpursuit.lock import Owner, RunLock, holder
from gradpursuit.manifest import Manifest
from gradpursuit.progress import Progress
from gradpursuit.sealed import write_sealed
from jobs import Job


@pytest.fixture(scope="module")
def template(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run whose gradients are collected."""
    job = Job(tmp_path_factory.mktemp("template"), tiny_path)
    assert main(["warmup", str(job.path)]) == 0
    assert main(["collect", str(job.run_dir)]) == 0
    return job


@pytest.fixture
def folder(template: Job, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template.run_dir, tmp_path / "run"))


def status(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """By stage."""
    capsys.readouterr()
    assert main(["status", str(folder), "--json", *flags]) == 0
    return {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}


def states(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    return [stage["state"] for stage in status(folder, capsys, *flags).values()]


def test_stages_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = status(folder, capsys)
    assert [stage["state"] for stage in found.values()] == ["complete"] * 3 + ["new"] * 4
    counts = {name: (stage["done"], stage["total"], stage["unit"]) for name, stage in found.items()}
    assert counts["data"] == (43, 43, "rows")
    assert counts["trajectory"] == (8, 8, "steps")
    assert counts["gradients"] == (74, 74, "rows")
    assert counts["selection"] == (None, None, "")
    assert all(found[name]["seconds"] > 0 and found[name]["started"] for name in ("data", "trajectory", "gradients"))
    assert main(["run", str(folder / "config.yaml")]) == 0
    found = status(folder, capsys)
    assert [stage["state"] for stage in found.values()] == ["complete"] * 7
    assert (found["selection"]["done"], found["export"]["total"]) == (3, 3)
    assert (found["evaluation"]["done"], found["evaluation"]["total"]) == (9, 9)
    assert main(["status", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "at work: nobody" in text
    assert "9/9 cells" in text
    assert "Traceback" not in text


def test_it_is_quick_loads_nothing_heavy_and_changes_nothing(folder: Path) -> None:
    code = (
        "import sys, time, gradpursuit.cli\n"
        f"assert gradpursuit.cli.main(['status', {str(folder)!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'pyarrow', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(time.process_time())\n"
    )
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    seconds = []
    for _ in range(2):  # the first may have to compile the package
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout.splitlines()[-1]))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert min(seconds) < 2, "measured 0.3 s; the bound leaves room for a slow machine without compiled files"


def test_damage_and_changed_inputs_are_seen(
    folder: Path, template: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = folder / "gradients/pool/adam-symmetric/checkpoint-2/shard-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    found = status(folder, capsys)
    assert (found["gradients"]["state"], found["gradients"]["done"]) == ("damaged", 67)
    shard.unlink()
    assert states(folder, capsys)[:3] == ["complete", "complete", "damaged"]
    shard.write_bytes(content)
    assert states(folder, capsys)[2] == "complete"
    moments = folder / "trajectory/checkpoint-1/moments.safetensors"
    moments.write_bytes(moments.read_bytes()[:-1])
    assert states(folder, capsys)[:3] == ["complete", "damaged", "complete"]
    assert states(folder, capsys, "--gradients.dim", "128")[:4] == ["complete", "damaged", "outdated", "new"]

    pool = template.folder / "pool.jsonl"
    kept, stamp = pool.read_bytes(), pool.stat()
    try:
        pool.write_bytes(kept.replace(b"plus 1?", b"plus 2?"))
        assert states(folder, capsys) == ["outdated"] * 3 + ["new"] * 4
        pool.unlink()
        found = status(folder, capsys)
        assert found["data"]["state"] == "complete"
        assert found["data"]["note"] == f"not there any more: {pool}; what was made of it is used"
    finally:
        pool.write_bytes(kept)  # of another time, but with the same content
        assert pool.stat().st_mtime_ns != stamp.st_mtime_ns
    assert states(folder, capsys)[0] == "complete"


def test_another_setting_makes_unfinished_rows_not_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest(folder).read()
    manifest["stages"]["gradients"]["state"] = "running"  # as a kill leaves it
    write_sealed(folder / "manifest.json", manifest)
    time.sleep(1)  # of the clock that the manifest keeps
    with RunLock(folder):
        assert status(folder, capsys)["gradients"]["state"] == "unfinished", "it was another process that began it"
    assert status(folder, capsys)["gradients"]["done"] == 74
    store = folder / "gradients/pool"
    assert finished_rows(store, ["adam-symmetric"], {"dim": 256}) == 62
    assert finished_rows(store, ["adam-symmetric"], {"dim": 128}) == 0
    assert finished_rows(store, ["adam-symmetric", "none"], {}) == 0
    assert finished_rows(store, [], {}) == 0


def test_folders_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, words in ((tmp_path, "not a run folder"), (tmp_path / "none", "no such folder")):
        assert main(["status", str(folder)]) == 2
        assert f"error: {folder}: {words}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_working_process_tells_its_numbers(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        owner = holder(tmp_path)
        assert owner is not None
        assert read_progress(tmp_path, owner, "gradients") is None
        with telling(tmp_path, "gradients"):
            with Progress("rows of x", 10, done=2) as progress:
                told = read_progress(tmp_path, owner, "gradients")
                assert told is not None
                assert (told["what"], told["done"], told["total"], told["rate"]) == ("rows of x", 2, 10, 0)
                progress.update(3)
                assert read_progress(tmp_path, owner, "gradients") == told, "not more often than once a second"
                time.sleep(1.05)
                progress.update(1)
                told = read_progress(tmp_path, owner, "gradients")
                assert told is not None
                assert told["done"] == 6
                assert 2 < told["rate"] < 4  # four rows in little more than a second; the first two were there before
                assert read_progress(tmp_path, owner, "data") is None
                assert read_progress(tmp_path, Owner(os.getpid() + 1, "h", "t", "c"), "gradients") is None
            assert (tmp_path / NAME).is_file()
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "run.json"}
        with Progress("nobody listens", 1):
            assert not (tmp_path / NAME).exists()
