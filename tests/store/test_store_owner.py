"""One store elsewhere has one owner, known by the random id of its run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from gradpursuit.cli import main
from gradpursuit.errors import GradPursuitError, RunError, StoreError
from gradpursuit.marker import run_id
from gradpursuit.owner import claim
from jobs import Job


def made(folder: Path) -> Path:
    folder.mkdir()
    run_id(folder)
    return folder


def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    first, second, store = made(tmp_path / "a"), made(tmp_path / "b"), tmp_path / "stores" / "s"
    claim(store, first)
    claim(store, first)
    (store / "pool").mkdir()
    before = (store / "owner.json").read_bytes()
    with pytest.raises(StoreError) as caught:
        claim(store, second)
    message = str(caught.value)
    assert f"{store}: belongs to the run in {first} on " in message
    assert "Give this run a gradients.store of its own" in message
    assert "move owner.json away and run again" in message
    assert (store / "owner.json").read_bytes() == before
    shutil.rmtree(first)
    with pytest.raises(StoreError, match="belongs to the run in"):
        claim(store, second)  # its features are still there
    claim(tmp_path / "stores" / "t", second)
    assert sorted(path.name for path in (tmp_path / "stores").iterdir()) == ["s", "t"]


def test_a_run_made_anew_in_the_same_folder_is_another_one(tmp_path: Path) -> None:
    run, store = made(tmp_path / "a"), tmp_path / "s"
    claim(store, run)
    shutil.rmtree(run)
    made(run)
    with pytest.raises(StoreError, match=f"{store}: belongs to the run in {run} on "):
        claim(store, run)


def test_a_moved_run_keeps_its_store_and_a_copy_does_not_get_it(tmp_path: Path) -> None:
    run, store = made(tmp_path / "a"), tmp_path / "s"
    claim(store, run)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    with pytest.raises(StoreError, match=f"belongs to the run in {run} on .*, of which {copy} is a copy"):
        claim(store, copy)
    moved = run.rename(tmp_path / "moved")
    claim(store, moved)
    assert json.loads((store / "owner.json").read_text())["folder"] == str(moved)
    link = tmp_path / "link"
    link.symlink_to(moved)
    claim(store, link)


@pytest.mark.parametrize("text", ["{", "[]", '{"run": 3}', '{"run": "a", "folder": "b", "host": 1}'])
def test_a_damaged_owner_is_named(tmp_path: Path, text: str) -> None:
    run, store = made(tmp_path / "a"), tmp_path / "s"
    claim(store, run)
    (store / "owner.json").write_text(text)
    with pytest.raises(GradPursuitError, match=r"owner\.json: damaged"):
        claim(store, run)
    assert (store / "owner.json").read_text() == text


@pytest.mark.parametrize("name", ["thesis.txt", "pool/photo.jpg", "manifest.json", "targets/x"])
def test_a_folder_with_something_else_is_no_store(tmp_path: Path, name: str) -> None:
    run, store = made(tmp_path / "a"), tmp_path / "s"
    (store / name).parent.mkdir(parents=True)
    (store / name).write_text("mine")
    with pytest.raises(StoreError, match=r"holds something else \('.*'\); nothing was changed"):
        claim(store, run)
    assert [path for path in store.rglob("*") if path.is_file()] == [store / name]


def test_a_store_of_an_earlier_version_gets_an_owner(tmp_path: Path) -> None:
    run, store = made(tmp_path / "a"), tmp_path / "s"
    (store / "pool/adam").mkdir(parents=True)
    (store / "pool/adam/manifest.json").write_text("{}")
    claim(store, run)
    assert json.loads((store / "owner.json").read_text())["run"] == run_id(run)


@pytest.mark.parametrize("inside", ["", "gradients", "deeper/down"])
def test_a_store_in_another_run_or_in_its_store_is_refused(tmp_path: Path, inside: str) -> None:
    first, second = made(tmp_path / "a"), made(tmp_path / "b")
    with pytest.raises(StoreError, match=f"lies in another run, {first}"):
        claim(first / inside, second)
    claim(tmp_path / "s", first)
    with pytest.raises(StoreError, match=r"lies in the store of another run|belongs to the run in"):
        claim(tmp_path / "s" / inside, second)


@pytest.mark.parametrize("inside", ["", "data", "selection/gtp"])
def test_a_store_where_its_own_run_writes_other_things_is_refused(tmp_path: Path, inside: str) -> None:
    run = made(tmp_path / "a")
    with pytest.raises(StoreError, match="is a folder that the run uses otherwise"):
        claim(run / inside, run)
    claim(run / "gradients", run)
    assert not (run / "gradients").exists()


def test_the_command_refuses_before_any_work(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    store = job.folder / "store"
    claim(store, made(job.folder / "first"))
    job.save(gradients={"store": str(store)})
    assert main(["run", str(job.path)]) == 2
    message = capsys.readouterr().err
    assert re.search(rf"error: {store}: belongs to the run in {job.folder / 'first'} on ", message)
    assert not (job.run_dir / "data").exists()


def test_a_link_in_place_of_the_owner_is_not_written_through(tmp_path: Path) -> None:
    run, store, other = made(tmp_path / "a"), tmp_path / "s", tmp_path / "other"
    store.mkdir()
    (store / "owner.json").symlink_to(other)
    with pytest.raises((RunError, StoreError)):
        claim(store, run)
    assert not other.exists()
