from __future__ import annotations

import errno
import json
import os
import socket
import threading
from pathlib import Path

import pytest

from gradpursuit import lock as module
from gradpursuit.cli import main
from gradpursuit.errors import RunError
from gradpursuit.lock import Owner, RunLock, holder, in_turn
from gradpursuit.marker import run_id
from jobs import Job


def test_held_it_names_its_owner_and_released_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    assert holder(folder) is None
    with RunLock(folder) as lock:
        assert lock.created
        owner = holder(folder)
        assert owner is not None
        assert (owner.pid, owner.host) == (os.getpid(), socket.gethostname())
        with lock:
            assert holder(folder) == owner
        assert holder(folder) == owner, "leaving an inner block releases nothing"
        with pytest.raises(RunError, match=rf"{folder}: another process is at work.*pid {os.getpid()} on .*since 20"):
            RunLock(folder).__enter__()
        assert holder(folder) == owner, "a refused one leaves the owner's name"
    assert holder(folder) is None
    with RunLock(folder) as lock:
        assert not lock.created


def test_released_on_every_way_out(tmp_path: Path) -> None:
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), RunLock(tmp_path):
            raise error
        assert holder(tmp_path) is None


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (
            Owner(os.getppid(), "here", "2025-01-01", "gradpursuit run x.yaml"),
            "here, since 2025-01-01 (gradpursuit run",
        ),
        (Owner(999_999_999, "another-machine", "2025-01-01", "x"), "pid 999999999 on another-machine"),
        (None, "an unknown process"),
    ],
    ids=["its number is another's now", "of another machine", "half written"],
)
def test_a_stale_lock_is_taken_over_and_told(
    tmp_path: Path, left: Owner | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_id(tmp_path)
    (tmp_path / ".lock").write_text(json.dumps(vars(left)) if left else '{"pid": 12')
    assert holder(tmp_path) is None
    with caplog.at_level("WARNING", "gradpursuit"), RunLock(tmp_path):
        owner = holder(tmp_path)
        assert owner is not None
        assert owner.pid == os.getpid()
    assert "taking over the lock of" in caplog.text
    assert words in caplog.text
    caplog.clear()
    with RunLock(tmp_path):
        assert not caplog.records, "a lock that was released is nobody's"


def test_the_lock_of_a_deleted_folder_is_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunLock(folder) as first:
        late = RunLock(folder)
        file = late._open()  # opened before the folder went, locked after
        first.discard_folder()
        assert not folder.exists()
    try:
        assert not late._is_in_place(file)
    finally:
        os.close(file)
    with RunLock(folder) as lock:
        assert lock.created
        assert (folder / ".lock").is_file()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(_file: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with caplog.at_level("WARNING", "gradpursuit"), RunLock(tmp_path):
        owner = holder(tmp_path)
        assert owner is not None
        assert owner.pid == os.getpid()
    assert "this file system has no locks" in caplog.text
    assert holder(tmp_path) is None


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="cannot be written"):
            RunLock(folder).__enter__()


def test_every_writing_verb_is_refused_and_touches_nothing(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradpursuit.lock._PATIENCE", 0.05)
    folder = job.run_dir
    with RunLock(folder):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        verbs = [["run", str(job.path)], ["quickstart", "--run-dir", str(folder)], ["warmup", str(job.path)]]
        for arguments in verbs:
            assert main(arguments) == 2
            message = capsys.readouterr().err
            assert f"error: {folder}: another process is at work in this run folder: pid {os.getpid()} on" in message
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        assert sorted(before) == [folder / ".lock", folder / "run.json"]
        assert main(["status", str(folder)]) == 2
        assert "is at work here, but has not begun a stage" in capsys.readouterr().err
    assert main(["warmup", str(job.path)]) == 0
    capsys.readouterr()
    with RunLock(folder):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        add = ["target", "add", str(folder), "--name", "n", "--file", str(job.folder / "target.jsonl")]
        for arguments in (*([verb, str(folder)] for verb in ("collect", "select", "export", "compare")), add):
            assert main(arguments) == 2
            assert "another process is at work" in capsys.readouterr().err
        assert main(["status", str(folder)]) == 0
        assert f"at work: pid {os.getpid()}" in capsys.readouterr().out
        assert main(["target", "list", str(folder)]) == 0
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_with_something_of_the_users_is_not_discarded(tmp_path: Path) -> None:
    with RunLock(tmp_path / "a" / "run") as lock:
        (tmp_path / "a" / "run" / "notes.txt").write_text("mine")
        lock.discard_folder()
    assert (tmp_path / "a" / "run" / "notes.txt").read_text() == "mine"


def test_a_lock_made_this_instant_is_waited_for(tmp_path: Path) -> None:
    """Another process has made it, and has not said yet whose it is."""
    (tmp_path / ".lock").touch()
    owner = json.dumps(vars(Owner(1, "here", "2025-01-01", "x")))
    other = threading.Timer(0.1, (tmp_path / ".lock").write_text, [owner])
    other.start()
    with RunLock(tmp_path):
        assert (tmp_path / "run.json").is_file()
    other.join()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_lock_or_log_that_is_a_link_is_not_written(tmp_path: Path, link: object) -> None:
    from gradpursuit.durable import open_own

    other, folder = tmp_path / "other", tmp_path / "run"
    other.write_text("the user's")
    with RunLock(folder):
        pass
    (folder / ".lock").unlink()
    link(other, folder / ".lock")  # type: ignore[operator]
    with pytest.raises(RunError, match=r"\.lock: cannot be written: .*; .* move (the link|it) away"):
        RunLock(folder).__enter__()
    with pytest.raises(RunError, match=r"cannot be written: .*; .* move (the link|it) away"), in_turn(folder):
        pass
    with pytest.raises(OSError, match="link"):
        open_own(folder / ".lock", os.O_WRONLY)
    assert other.read_text() == "the user's"


def test_processes_that_share_a_folder_take_turns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, order = tmp_path / "a" / "cache", []

    def second() -> None:
        with in_turn(folder):
            order.append("second")

    with caplog.at_level("INFO", "gradpursuit"):
        with in_turn(folder):
            other = threading.Thread(target=second)
            other.start()
            while not caplog.records:
                other.join(0.01)
            order.append("first")
        other.join()
    assert caplog.messages == [f"{folder}: another process is filling this folder; waiting for it"]
    assert order == ["first", "second"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"), in_turn(tmp_path / "file" / "cache"):
        pass
