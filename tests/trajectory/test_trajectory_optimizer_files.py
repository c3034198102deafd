"""The index of a sharded checkpoint runs nothing that it names, and is refused where it is none."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata

from gradpursuit.errors import TrajectoryError
from gradpursuit.trajectory.optimizer_files import read_distributed, read_optimizer

STATE = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": {"c": torch.ones(2, dtype=torch.bfloat16), "n": 3, "d": torch.zeros(1, 2, 2, 2)},
    "l": [1, 2],
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder as torch writes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({**STATE}, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    return tmp_path / "optimizer_0"


class _Calls:
    """Pickled, it is a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def _named(module: str, name: str, argument: bytes) -> bytes:
    """A pickle of protocol 4 that calls what `name`, with its dots, means in `module`."""

    def text(value: bytes) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value

    return b"\x80\x04" + text(module.encode()) + text(name.encode()) + b"\x93" + text(argument) + b"\x85R."


def test_what_torch_writes_is_read(saved: Path) -> None:
    found = read_distributed(saved)
    assert torch.equal(found["a"], STATE["a"])
    assert found["b.c"].dtype == torch.bfloat16
    assert (found["b.n"], found["l"]) == (3, [1, 2])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pathlib", "Path.unlink"),
        ("pathlib", "Path.write_text"),
        ("pathlib", "os.system"),
        ("pathlib", "os"),
        ("torch.distributed.checkpoint.filesystem", "os.unlink"),
        ("torch.distributed.checkpoint.filesystem", "pickle.loads"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("torch.distributed.checkpoint.format_utils", "dcp_to_torch_save"),
        ("torch.distributed.checkpoint.metadata", "os.unlink"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.serialization", "load"),
        ("torch", "load"),
        ("torch", "serialization.os.unlink"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "unlink"),
    ],
)
def test_what_an_index_names_is_not_run(saved: Path, tmp_path: Path, module: str, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (saved / ".metadata").write_bytes(_named(module, name, str(victim).encode()))
    with pytest.raises(TrajectoryError, match="is no part of an index"):
        read_optimizer(tmp_path)
    assert victim.read_text() == "kept"


def test_a_path_is_made_that_can_do_nothing(saved: Path, tmp_path: Path) -> None:
    (saved / ".metadata").write_bytes(_named("pathlib", "PosixPath", b"x"))
    with pytest.raises(TrajectoryError, match="is no index"):
        read_optimizer(tmp_path)


def test_an_index_cannot_change_a_class(saved: Path, tmp_path: Path) -> None:
    name = b"torch.distributed.checkpoint.metadata"
    made = b"\x80\x04\x8c" + bytes([len(name)]) + name + b"\x8c\x08Metadata\x93"
    payload = made + b"N}\x8c\x07version\x8c\x01xs\x86b."
    before = Metadata.version
    (saved / ".metadata").write_bytes(payload)
    with pytest.raises(TrajectoryError, match="the state of a type is no part of an index"):
        read_optimizer(tmp_path)
    assert Metadata.version == before


def test_an_index_leads_nowhere_else_and_fits_its_files(saved: Path, tmp_path: Path) -> None:
    index = FileSystemReader(saved).read_metadata()
    first = next(iter(index.storage_data))

    def refused(changed: Metadata, reason: str) -> None:
        (saved / ".metadata").write_bytes(pickle.dumps(changed))
        with pytest.raises(TrajectoryError, match=reason):
            read_optimizer(tmp_path)

    for path in ("../secret", "/etc/passwd", "..", ""):
        places = {**index.storage_data, first: _StorageInfo(path, 0, 10)}
        refused(Metadata(index.state_dict_metadata, index.planner_data, places), "outside of the folder")
    huge = TensorStorageMetadata(TensorProperties(), torch.Size([1 << 40]), [])
    refused(Metadata({"x": huge}, None, index.storage_data), "more numbers than its files hold")
    refused(Metadata({"x": 3}, None, index.storage_data), "no tensor")  # type: ignore[dict-item]
    refused(Metadata(None, None, {MetadataIndex("x"): 3}), "names no tensors")  # type: ignore[arg-type]


@pytest.mark.parametrize("payload", [b"", b"\x80", b"garbage", b"\x80\x04N.", b"\x80\x04]\x94h\x00a."])
def test_damage_is_one_message(saved: Path, tmp_path: Path, payload: bytes) -> None:
    (saved / ".metadata").write_bytes(payload)
    with pytest.raises(TrajectoryError, match="cannot be read"):
        read_optimizer(tmp_path)


def test_weights_as_pickles_run_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    torch.save(_Calls(Path.unlink, victim), tmp_path / "optimizer.pt")
    with pytest.raises(TrajectoryError, match="cannot be read"):
        read_optimizer(tmp_path)
    assert victim.read_text() == "kept"


def test_values_that_are_no_tensors_run_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    folder = tmp_path / "optimizer_0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"x": _Calls(Path.unlink, victim)}, storage_writer=FileSystemWriter(folder), no_dist=True)
    with pytest.raises(TrajectoryError, match="cannot be read"):
        read_optimizer(tmp_path)
    assert victim.read_text() == "kept"
