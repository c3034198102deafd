"""Finished work comes back from any error, interruption or kill until its replacement is whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradpursuit import aside
from gradpursuit.aside import before, recover, replacing, settled, unfinished
from gradpursuit.errors import RunError
from gradpursuit.files import write_folder, write_json, write_text
from gradpursuit.lock import RunLock
from gradpursuit.owner import claim

# One replacement of everything that can be replaced, which kills itself before its n-th rename, deletion or sync.
SCRIPT = """
import os, signal, shutil, sys
from pathlib import Path
from gradpursuit.aside import replacing
from gradpursuit.files import write_text
from gradpursuit.lock import RunLock
root, left = Path(sys.argv[1]), int(sys.argv[2])
def counted(real):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    return call
with RunLock(root):
    os.fsync, Path.replace, Path.unlink = counted(os.fsync), counted(Path.replace), counted(Path.unlink)
    shutil.rmtree = counted(shutil.rmtree)
    with replacing(root, "selection", [root / "manifest.json"]) as old:
        old.set_aside(root / "selection")
        old.set_aside(root / "evaluation", copy=True)
        write_text(root / "selection/a", "new")
        write_text(root / "selection/b", "new")
        write_text(root / "evaluation/a", "new")
        write_text(root / "manifest.json", '{"format": 1, "stages": {"new": {}}}')
        old.commit(["selection/a"])
"""
OLD = {"selection/a": "old", "evaluation/a": "old", "manifest.json": '{"format": 1, "stages": {}}'}
NEW = {
    "selection/a": "new",
    "selection/b": "new",
    "evaluation/a": "new",
    "manifest.json": '{"format": 1, "stages": {"new": {}}}',
}


def texts(root: Path) -> dict[str, str]:
    found = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}
    return {name: text for name, text in found.items() if name not in (".lock", "run.json")}


def old_run(root: Path) -> Path:
    for name, text in OLD.items():
        write_text(root / name, text)
    return root


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_and_nothing_else(tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []
    for moment in range(1, 200):
        root = old_run(tmp_path / str(moment))
        # Forked, as starting Python anew for each of the moments would take a minute.
        child = os.fork()
        if child == 0:
            sys.argv = ["script", str(root), str(moment)]
            try:
                exec(compile(SCRIPT, "script", "exec"), {})
            except BaseException:
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        with RunLock(root):
            pass
        seen.append(texts(root))
        assert seen[-1] in (OLD, NEW), f"killed at moment {moment}"
    assert len(seen) > 30
    assert OLD in seen
    assert NEW in seen
    assert seen == sorted(seen, key=lambda one: one == NEW), "once the new work counts it stays"


def test_two_kills_in_a_row_lose_nothing(tmp_path: Path) -> None:
    root = old_run(tmp_path / "run")
    for moment in (24, 24, 20, 10):
        command = [sys.executable, "-c", SCRIPT, str(root), str(moment)]
        assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    with RunLock(root):
        pass
    assert texts(root) == OLD


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, MemoryError])
def test_the_old_work_comes_back_from_every_error(tmp_path: Path, error: type[BaseException]) -> None:
    root = old_run(tmp_path)

    def fail() -> None:
        with replacing(root, "selection", [root / "manifest.json"]) as old:
            old.set_aside(root / "selection")
            old.set_aside(root / "evaluation", copy=True)
            old.set_aside(root / "report.html")
            write_text(root / "selection/b", "new")
            write_text(root / "evaluation/a", "new")
            write_text(root / "report.html", "new")
            write_text(root / "manifest.json", "{}")
            raise error

    with pytest.raises(error):
        fail()
    assert texts(root) == OLD


def test_a_begun_replacement_waits_for_the_next_attempt(tmp_path: Path) -> None:
    root = old_run(tmp_path)

    def fail() -> None:
        with replacing(root, "gradients", [], keep_unfinished=True):
            assert aside.set_aside(root / "selection")
            write_text(root / "selection/half", "new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (root / "selection/a").read_text() == "old"
    assert (unfinished(root / "selection") / "half").read_text() == "new"
    assert not before(root / "selection").exists()
    assert not aside.set_aside(root / "selection"), "no replacement is open"


def test_files_of_the_user_in_a_folder_that_is_replaced_are_kept(tmp_path: Path) -> None:
    root = old_run(tmp_path)
    write_text(root / "selection/notes/mine.txt", "mine")
    write_text(root / "selection/b", "mine, by a name that the new work takes")
    with replacing(root, "selection", []) as old:
        old.set_aside(root / "selection")
        write_text(root / "selection/a", "new")
        write_text(root / "selection/b", "new")
        old.commit(["selection/a"])
    found = texts(root / "selection")
    (kept,) = [name for name in found if name.startswith("b.kept-")]
    assert found == {"a": "new", "b": "new", kept: "mine, by a name that the new work takes", "notes/mine.txt": "mine"}


@pytest.mark.parametrize("name", [aside.OPEN, aside.DONE])
def test_a_damaged_list_of_what_was_set_aside_is_named_and_nothing_is_deleted(tmp_path: Path, name: str) -> None:
    root = old_run(tmp_path)
    before(root / "selection").mkdir()
    write_text(root / name, '{"places": 3}')
    with pytest.raises(RunError, match=r"damaged or unreadable .*give each its NAME again, then move this file away"):
        recover(root)
    assert before(root / "selection").is_dir()
    assert (root / "selection/a").is_file()


@pytest.mark.parametrize("name", [aside.OPEN, aside.DONE])
@pytest.mark.parametrize("named", ["../victim", "{}/victim", "link/victim", ".", "selection/../../victim"])
def test_what_a_stranger_lists_as_set_aside_is_not_touched_outside_of_the_run(
    tmp_path: Path, name: str, named: str
) -> None:
    root, victim = old_run(tmp_path / "run"), tmp_path / "victim"
    for folder in (victim, before(victim)):
        write_text(folder / "thesis.txt", "years")
    (root / "link").symlink_to(tmp_path)
    place = {"path": named.format(tmp_path), "there": False, "copied": False}
    write_json(root / name, {"what": "data", "keep_unfinished": False, "places": [place], "files": {}})
    with pytest.raises(RunError, match="no place where this run alone writes"):
        recover(root)
    assert (victim / "thesis.txt").is_file()
    assert (before(victim) / "thesis.txt").is_file()
    assert (root / name).is_file()


def test_what_a_stranger_lists_as_files_is_not_written_outside_of_the_run(tmp_path: Path) -> None:
    root, victim = old_run(tmp_path / "run"), tmp_path / "thesis.txt"
    victim.write_text("years")
    for text in ("gone", None):
        value = {"what": "data", "keep_unfinished": False, "places": [], "files": {"../thesis.txt": text}}
        write_json(root / aside.OPEN, value)
        with pytest.raises(RunError, match="none of the run's"):
            recover(root)
    assert victim.read_text() == "years"


def test_work_set_aside_in_a_store_elsewhere_comes_back_for_its_owner_alone(tmp_path: Path) -> None:
    store, kinds = tmp_path / "store", tmp_path / "store/pool/adam"
    roots = [old_run(tmp_path / name) for name in ("owner", "other")]
    for root in roots:
        with RunLock(root):
            pass
    claim(store, roots[0])
    place = {"path": str(kinds), "there": True, "copied": False}
    for root in roots:
        write_json(root / aside.OPEN, {"what": "gradients", "keep_unfinished": False, "places": [place], "files": {}})
    write_text(before(kinds) / "shard", "old")
    write_text(kinds / "shard", "new")
    with pytest.raises(RunError, match="no place where this run alone writes"):
        recover(roots[1])
    assert (kinds / "shard").read_text() == "new"
    shutil.copytree(roots[0], tmp_path / "copy")
    with pytest.raises(RunError, match="no place where this run alone writes"):
        recover(tmp_path / "copy")
    recover(roots[0])
    assert (kinds / "shard").read_text() == "old"


def test_a_folder_killed_while_it_is_swapped_is_found_again(tmp_path: Path) -> None:
    folder, old = tmp_path / "out", aside._swapped(tmp_path / "out")
    write_text(old / "a", "old")
    settled(folder)
    assert texts(tmp_path) == {"out/a": "old"}
    write_text(old / "a", "older")
    with write_folder(folder) as part:
        (part / "a").write_text("new")
    assert texts(tmp_path) == {"out/a": "new"}


def test_a_full_disk_brings_the_old_work_back(small_disk: Path) -> None:
    root = old_run(small_disk / "run")

    def fail() -> None:
        with RunLock(root), replacing(root, "selection", [root / "manifest.json"]) as old:
            old.set_aside(root / "selection")
            write_text(root / "manifest.json", "{}")
            write_text(root / "selection/a", "new")
            write_text(root / "selection/b", "x" * (4 << 20))

    for _ in range(2):
        with pytest.raises(RunError, match="no space left on the disk"):
            fail()
        assert texts(root) == OLD


def test_a_link_in_place_of_a_folder_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    root, other = old_run(tmp_path / "run"), tmp_path / "other"
    write_text(other / "mine", "mine")
    (root / "data").symlink_to(other)
    with replacing(root, "data", []) as old:
        old.set_aside(root / "data")
        write_text(root / "data/pool", "new")
        old.commit(["data/pool"])
    assert texts(other) == {"mine": "mine"}
    assert not (root / "data").is_symlink()
    assert texts(root / "data") == {"pool": "new"}
