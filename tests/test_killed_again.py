"""A finished run of which a stage is made again with other settings, and is killed: it is what it was."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradpursuit.cli import main
from jobs import Job
from server import Server

AGAIN = {
    "data": ["warmup", "--data.max_tokens", "200"],
    "trajectory": ["warmup", "--warmup.epochs", "1"],
    "gradients": ["collect", "--gradients.dim", "128"],
    "selection": ["select", "--selection.k", "3"],
    "evaluation": ["compare", "--evaluation.epochs", "2"],
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="module")
def run(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A finished run with an added target; every test leaves it as it was."""
    job = Job(tmp_path_factory.mktemp("finished"), tiny_path)
    job.save(evaluation={"seeds": 1}, selection={"strategies": ["less"]})
    assert server.here(["run", str(job.path), "--quiet"]) == 0
    for number, name in enumerate(("first", "second")):
        job.write(f"{name}.jsonl", [job.row(i, "minus") for i in range(number, 6 + number)])
    add = ["target", "add", str(job.run_dir), "--name", "other", "--file", str(job.folder / "first.jsonl"), "--quiet"]
    assert server.here(add) == 0
    return job.run_dir


def files(folder: Path) -> dict[str, bytes]:
    """Every file of the run but those that say when, and what was begun and waits for another attempt."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {
        name: content
        for name, content in found.items()
        if name not in ("log.txt", ".lock", "progress.json") and "gradpursuit-unfinished" not in name
    }


@pytest.mark.parametrize("stage", AGAIN)
def test_a_stage_that_is_killed_leaves_the_finished_run(server: Server, run: Path, tmp_path: Path, stage: str) -> None:
    before, states = files(run), state(server, run, tmp_path)
    assert set(states.values()) == {"complete"}
    verb, *settings = AGAIN[stage]
    for _ in range(2):  # twice in a row
        command = server.start([verb, str(run), *settings], tmp_path / "killed.txt", dies_in=stage)
        assert command.wait()[0] == -signal.SIGKILL
        assert files(run) != before
    assert state(server, run, tmp_path) == states
    assert files(run) == before


def state(server: Server, run: Path, tmp_path: Path) -> dict[str, str]:
    code, printed = server.start(["status", str(run), "--json"], tmp_path / "status.txt").wait()
    assert code == 0, printed
    return {entry["stage"]: entry["state"] for entry in json.loads(printed[printed.index("{") :])["stages"]}


def test_a_replaced_target_comes_back_after_two_kills(server: Server, run: Path, tmp_path: Path) -> None:
    before = files(run)
    add = ["target", "add", str(run), "--name", "other", "--file", str(run.parent / "second.jsonl"), "--replace"]
    for moment in ("data", "gradients", "gradients"):
        assert server.start(add, tmp_path / "killed.txt", dies_in=moment).wait()[0] == -signal.SIGKILL
        assert files(run) != before
    code, printed = server.start(["target", "list", str(run), "--json"], tmp_path / "list.txt").wait()
    assert code == 0, printed
    (found,) = json.loads(printed[printed.index("[\n") :])
    assert found["state"] == "complete"
    assert list(found["files"]["target"]) == [str(run.parent / "first.jsonl")]
    assert files(run) == before


@pytest.mark.parametrize(("stage", "error"), [("selection", KeyboardInterrupt), ("gradients", OSError)])
def test_a_stage_that_is_interrupted_leaves_the_finished_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: type[BaseException]
) -> None:
    from gradpursuit.manifest import Manifest

    before, complete = files(run), Manifest.complete

    def failing(manifest: Manifest, name: str, *rest: object) -> None:
        if name == stage:
            raise error
        complete(manifest, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Manifest, "complete", failing)
    verb, *settings = AGAIN[stage]
    assert main([verb, str(run), *settings]) == (130 if error is KeyboardInterrupt else 2)
    assert files(run) == before


def test_shards_that_were_begun_are_not_computed_again(server: Server, run: Path, tmp_path: Path) -> None:
    arguments = ["collect", str(run), "--gradients.dim", "128"]
    server.start(arguments, tmp_path / "killed.txt", dies_in="gradients").wait()
    assert server.start(["status", str(run)], tmp_path / "status.txt").wait()[0] == 0
    begun = {path.stat().st_ino for path in run.rglob(".*-unfinished/checkpoint-*/*.safetensors")}
    assert begun
    code, printed = server.start(arguments, tmp_path / "again.txt").wait()
    assert code == 0, printed
    assert {path.stat().st_ino for path in (run / "gradients").rglob("checkpoint-*/*.safetensors")} == begun
    assert not list((run / "gradients").rglob(".*.gradpursuit-*"))
    assert not (run / ".replaced.json").exists()
