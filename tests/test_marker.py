"""What is a run and what is not: only the first is written into."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradpursuit.cli import main
from gradpursuit.errors import RunError
from gradpursuit.lock import RunLock
from gradpursuit.marker import NAME, known_id, run_id
from gradpursuit.opening import read_config
from gradpursuit.sealed import sealed_text
from jobs import Job


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FOREIGN = {
    "folders like ours": {"data/notes.txt": "mine", "trajectory/a": "b", "selection/x": "y", "report.html": "<p>"},
    "a manifest of others": {"manifest.json": '{"format": "webext", "version": 3}'},
    "a manifest with stages": {"manifest.json": '{"stages": {}}'},
    "a broken manifest": {"manifest.json": "{"},
    "a configuration": {"config.yaml": "a: 1"},
    "a lock": {".lock": ""},
    "a hidden file": {".git/HEAD": "ref"},
    "a marker of others": {NAME: '{"id": "x"}'},
    "a part": {"x.part": "mine"},
    "an empty folder in it": {},
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("verb", ["warmup", "run"])
def test_a_folder_that_is_no_run_is_left_as_it_is(
    job: Job, capsys: pytest.CaptureFixture[str], kind: str, verb: str
) -> None:
    folder = job.folder / "mine"
    for name, text in FOREIGN[kind].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if not FOREIGN[kind]:
        (folder / "data").mkdir(parents=True)
    before = content(folder)
    assert main([verb, str(job.path), "--run-dir", str(folder)]) == 2
    message = capsys.readouterr().err
    assert f"error: {folder}: not empty, and no run of gradpursuit (it holds '" in message
    assert "nothing was written. Give the run a folder of its own: --run-dir" in message
    assert content(folder) == before


def test_an_empty_folder_becomes_a_run_with_an_id_of_its_own(tmp_path: Path) -> None:
    ids = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        for _ in range(2):
            with RunLock(tmp_path / name):
                ids.add(known_id(tmp_path / name))
    assert len(ids) == 2
    assert all(isinstance(found, str) and len(found) == 32 for found in ids)


@pytest.mark.parametrize("place", [0, 20, 40, 60, 100])
def test_a_damaged_id_is_named(tmp_path: Path, place: int) -> None:
    run_id(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "stages": {}}')
    made = bytearray((tmp_path / NAME).read_bytes())
    made[place] ^= 1
    (tmp_path / NAME).write_bytes(made)
    with pytest.raises(RunError, match=r"run\.json: damaged; put it back from a copy"):
        RunLock(tmp_path).__enter__()


def test_a_file_of_the_users_with_the_name_of_ours_is_not_overwritten(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLock(job.run_dir):
        pass
    for name in ("report.html", "data/mine.txt", "selection/gtp/selected.jsonl"):
        path = job.run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        assert main(["run", str(job.path)]) == 2
        assert "manifest.json does not say that this run wrote it; nothing was changed" in capsys.readouterr().err
        assert path.read_text() == "mine"
        path.unlink()
        if path.parent != job.run_dir:
            path.parent.rmdir()
        if name.startswith("selection"):
            path.parent.parent.rmdir()
    assert not (job.run_dir / "manifest.json").exists()
    assert json.loads((job.run_dir / NAME).read_text())["gradpursuit"] == "run"


def test_the_settings_of_a_copied_run_name_the_copy(tmp_path: Path) -> None:
    """Even if its manifest is lost: `run_dir` in them is the run that it was copied from."""
    text = f"model: {{path: m}}\ndata: {{pool: p.jsonl, target: t.jsonl}}\nrun_dir: {tmp_path / 'first'}\n"
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.yaml").write_text(sealed_text(text))
    assert read_config(tmp_path / "copy" / "config.yaml", []).run_dir == str(tmp_path / "copy")
    (tmp_path / "config.yaml").write_text(text)  # one of the user's
    assert read_config(tmp_path / "config.yaml", []).run_dir == str(tmp_path / "first")
