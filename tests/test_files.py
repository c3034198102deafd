"""Files are whole or absent, and what the disk refuses becomes one clear message."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from gradpursuit.errors import RunError
from gradpursuit.files import disk_error, read_json, require_space, sha256_of, write_atomic, write_json, write_text


def write_half(path: Path, error: BaseException) -> None:
    with write_atomic(path) as file:
        file.write(b"half")
        raise error


def test_file_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    with write_atomic(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1), MemoryError()])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        write_half(path, error)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_file_system_error_inside_the_block(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a\.bin: no space left on the disk"), write_atomic(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_network_errors_pass_through(tmp_path: Path) -> None:
    """`requests` raises OSErrors too: a broken connection is no fault of the disk."""
    import requests

    with pytest.raises(requests.ConnectionError):
        write_half(tmp_path / "a.bin", requests.ConnectionError("broken"))
    assert not list(tmp_path.iterdir())


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(RunError, match=r"f/a\.bin: cannot be written"), write_atomic(tmp_path / "f" / "a.bin"):
        pytest.fail("the block must not be entered")
    with pytest.raises(RunError, match="cannot be written"), write_atomic(tmp_path / "f" / "g" / "a.bin"):
        pytest.fail("the block must not be entered")


def test_target_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(RunError, match="cannot be written: Is a directory"):
        write_text(tmp_path / "a", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_another_files_name_is_not_taken_for_a_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt.part").write_text("the user's")
    write_text(tmp_path / "a.txt", "ü👋")
    assert (tmp_path / "a.txt").read_bytes() == "ü👋".encode()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "a.txt.part"]
    assert (tmp_path / "a.txt.part").read_text() == "the user's"


def test_a_link_in_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("the user's")
    (tmp_path / "manifest.json").symlink_to("other")
    write_json(tmp_path / "manifest.json", {})
    assert not (tmp_path / "manifest.json").is_symlink()
    assert (tmp_path / "other").read_text() == "the user's"


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is put on the disk and renamed, in order, with the names as they are then."""
    found: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def synced(file: int) -> None:
        found.append(("fsync", re.sub(r"\.[0-9a-f]{16}\.part", ".part", Path(f"/proc/self/fd/{file}").readlink().name)))
        fsync(file)

    def replaced(path: Path, target: Path) -> Path:
        found.append(("rename", Path(target).name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    return found


def test_contents_are_on_the_disk_before_names_and_folders_after(tmp_path: Path, order: list[tuple[str, str]]) -> None:
    write_text(tmp_path / "new" / "deep" / "a.txt", "x")
    top = tmp_path.name
    assert order == [
        ("fsync", top),
        ("fsync", "new"),
        ("fsync", "a.txt.part"),
        ("rename", "a.txt"),
        ("fsync", "deep"),
    ]


def test_what_libraries_write_in_a_folder_is_on_the_disk_before_its_name(
    tmp_path: Path, order: list[tuple[str, str]]
) -> None:
    from datasets import Dataset

    from gradpursuit.files import write_folder

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with write_folder(tmp_path / "out") as part:
        Dataset.from_dict({"a": [1]}).save_to_disk(part / "dataset")
    names = [name for _, name in order]
    renamed = order.index(("rename", "out"))
    for name in ("data-00000-of-00001.arrow", "state.json", "dataset_info.json", "dataset", "out.part"):
        assert names.index(name) < renamed, order
    assert names.index("state.json") < names.index("dataset") < names.index("out.part")
    assert order[renamed + 1] == ("fsync", tmp_path.name)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dataset"]


def test_json_round_trip_and_refusal_of_nan(tmp_path: Path) -> None:
    value = {"ü": [1, 2.5, None, True], "x": {"y": "z"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", float("nan"))
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_unreadable_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(
        RunError, match=r"a\.json: damaged, it is not the JSON that was written .*move it away and run the stage again"
    ):
        read_json(tmp_path / "a.json")
    with pytest.raises(RunError, match="not there"):
        read_json(tmp_path / "b.json")
    with pytest.raises(RunError, match="cannot be read"):
        read_json(tmp_path)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(RunError, match="No such file"):
        sha256_of(tmp_path / "b")


def test_require_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 164 << 20
    asked: list[Path] = []

    def usage(path: Path) -> object:
        asked.append(path)
        return shutil._ntuple_diskusage(1 << 40, 0, free)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folder = tmp_path / "not" / "yet"
    require_space(folder, 100 << 20, "the store")
    assert asked == [tmp_path]
    message = r"the store needs 101 MiB under .*yet, where 164 MiB are free \(64 MiB are kept in reserve\); free some"
    with pytest.raises(RunError, match=message):
        require_space(folder, 101 << 20, "the store")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_error_tells_a_full_disk_from_others(tmp_path: Path, number: int) -> None:
    message = str(disk_error(OSError(number, "x"), tmp_path / "a"))
    assert "no space left" in message
    assert "finished work is kept" in message
    assert "Permission denied" in str(disk_error(PermissionError(errno.EACCES, "Permission denied"), tmp_path / "a"))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EIO, errno.ENOSPC])
def test_what_the_system_refuses_is_no_reason_to_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    from gradpursuit.files import unreadable

    def refused(*_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_text", refused)
    if number != errno.ENOENT:  # a file that is not there has a message of its own
        with pytest.raises(RunError) as caught:
            read_json(tmp_path / "manifest.json")
        assert f"manifest.json: cannot be read: {os.strerror(number)}; " in str(caught.value)
        assert "delet" not in str(caught.value)
    for error in (disk_error(OSError(number, "x"), tmp_path), unreadable(OSError(number, "x"), tmp_path)):
        assert "; " in str(error)
        assert "delet" not in str(error)
        assert "away and run" not in str(error)


def test_full_disk(small_disk: Path) -> None:
    write_text(small_disk / "a.txt", "kept")
    with pytest.raises(RunError, match="no space left on the disk"), write_atomic(small_disk / "b.bin") as file:
        file.write(bytes(4 << 20))
    with pytest.raises(RunError, match="no space left on the disk"):
        write_text(small_disk / "a.txt", "x" * (4 << 20))
    assert [p.name for p in small_disk.iterdir()] == ["a.txt"]
    assert (small_disk / "a.txt").read_text() == "kept"
    with pytest.raises(RunError, match="MiB are free"):
        require_space(small_disk, 1, "anything")


def test_full_disk_under_store_and_table(small_disk: Path) -> None:
    import numpy as np

    from gradpursuit.data import Row, Table
    from gradpursuit.store import Shard
    from gradpursuit.store.shards import write_shard

    rng = np.random.default_rng(0)
    ones = np.ones(600, np.float32)
    big = Shard(rng.random((600, 1000), dtype=np.float32), ones, ones, ones.astype(np.int32), np.arange(600))
    with pytest.raises(RunError, match="no space left"):
        write_shard(small_disk / "s.safetensors", big, "f")
    rows = [Row(str(i), "h", "s", i, rng.bytes(4000).hex(), [1], [1]) for i in range(600)]
    with pytest.raises(RunError, match="no space left"):
        Table(rows).write(small_disk / "t.parquet")
    assert not list(small_disk.iterdir())
