"""Optimizer states as trainers write them: `Trainer`, FSDP (whole or sharded), and any named `state_dict`."""

from __future__ import annotations

import importlib
import io
import math
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch

from gradpursuit.errors import TrajectoryError

WAY_ON = (
    'train the run to follow with optim="adamw_torch", or do without moments: gradients.preconditioner: identity, and '
    "no strategy that needs them (less does)"
)
Key = int | str
_METADATA = "torch.distributed.checkpoint.metadata"
# All that the index of a checkpoint consists of, beside plain values: classes that keep what they are given.
_INDEX_CLASSES = {
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
}
_WITHOUT_STATE = {(_METADATA, "_MEM_FORMAT_ENCODING"), ("torch", "Size")}
_PATHS = ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath")


class NoMomentsError(TrajectoryError):
    """A checkpoint holds no Adam moments, or holds them in a form that cannot be read; its weights may still serve."""


@dataclass(frozen=True)
class SavedOptimizer:
    """The `state_dict` of an optimizer.

    Attributes:
        origin: the file or folder, for messages.
        state: what the optimizer keeps of each parameter, by number or name.
        groups: parameter groups; `params` lists the keys of `state`.
    """

    origin: str
    state: dict[Key, dict[str, Any]]
    groups: list[dict[str, Any]]


def read_optimizer(folder: Path) -> SavedOptimizer:
    """The optimizer state in a checkpoint folder of `transformers.Trainer` or `accelerate`.

    Read are `optimizer.pt` and `optimizer.bin` (with `weights_only=True`) and the folder `optimizer_0` of
    `torch.distributed.checkpoint`, for which no process group is needed.

    Raises:
        NoMomentsError: there is none, or it is sharded in a form that cannot be read.
        TrajectoryError: the file is broken.
    """
    for name in ("optimizer.pt", "optimizer.bin"):
        if (folder / name).is_file():
            path = folder / name
            return _parsed(str(path), load_torch(path))
    shards = folder / "optimizer_0"
    if (shards / ".metadata").is_file():
        tensors = read_distributed(shards)
        return _parsed(str(shards), {key.removeprefix("optimizer."): value for key, value in tensors.items()})
    for pattern, what in (
        ("global_step*/*optim_states.pt", "DeepSpeed ZeRO shards"),
        ("*optim_states.pt", "DeepSpeed ZeRO shards"),
        ("optimizer_*_rank*.bin", "one file per process (FSDP without torch.distributed.checkpoint)"),
        ("rank*-of-*-optimizer.pt", "XLA shards"),
    ):
        if found := sorted(folder.glob(pattern)):
            raise NoMomentsError(f"{found[0]}: {what}, which cannot be put together here; {WAY_ON}")
    raise NoMomentsError(
        f"{folder}: no optimizer state there (no optimizer.pt, optimizer.bin or optimizer_0); was it saved with "
        f"save_only_model=True? {WAY_ON}"
    )


def load_torch(path: Path) -> Any:
    """`torch.load` of tensors and plain containers alone.

    Raises:
        NoMomentsError: the file holds the low-bit tensors of torchao.
        TrajectoryError: it is broken, or holds other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for one broken file
        if "torchao" in str(error):
            raise NoMomentsError(f"{path}: the low-bit state of a torchao optimizer; {WAY_ON}") from None
        raise TrajectoryError(f"{path}: cannot be read: {' '.join(str(error).split())[:300]}") from None


def read_distributed(folder: Path) -> dict[str, Any]:
    """Everything in a folder of `torch.distributed.checkpoint`, whole, by dotted key.

    Raises:
        TrajectoryError: it is broken.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class Planner(dcp.DefaultLoadPlanner):
        """Reads what is no tensor as plainly as everything else."""

        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    class Reader(dcp.FileSystemReader):
        """Reads the index without running what it may hold."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (folder / ".metadata").open("rb") as file:
                index = _IndexUnpickler(file).load()
            _check_index(folder, index)
            return index

    try:
        reader = Reader(folder)
        found: dict[str, Any] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            if isinstance(entry, TensorStorageMetadata)
            else b""
            for key, entry in reader.read_metadata().state_dict_metadata.items()
        }
        planner = Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group, which is meant
            dcp.load(found, storage_reader=reader, planner=planner)
    except (Exception, CheckpointException) as error:  # many kinds, for one broken folder
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
        reason = " ".join(str(causes[0] if causes else error).split())[:300]
        raise TrajectoryError(f"{folder}: cannot be read: {reason or type(error).__name__}") from None
    return found


class _IndexUnpickler(pickle._Unpickler):  # of the one in C, no step can be replaced
    """Makes the few kinds of objects that a checkpoint's index consists of, and runs nothing that a file names."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the listed classes, or a data type of torch; refuse all else, names with dots too."""
        if (module, name) in _INDEX_CLASSES:
            return getattr(importlib.import_module(module), name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if module == "pathlib" and name in _PATHS:
            return PurePosixPath  # it cannot touch a file; where the checkpoint once lay matters to nobody
        value = vars(torch).get(name) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")

    def load_build(self) -> None:
        """Set the state of an object, never of a class: that would change it for the whole process."""
        if not isinstance(self.stack[-2], _with_state()):
            raise pickle.UnpicklingError(f"the state of a {type(self.stack[-2]).__name__} is no part of an index")
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build


def _with_state() -> tuple[type, ...]:
    return tuple(getattr(importlib.import_module(module), name) for module, name in _INDEX_CLASSES - _WITHOUT_STATE)


def _layout(name: str) -> torch.layout:
    """A memory layout by its name."""
    if name not in ("torch.strided", "torch.sparse_coo"):
        raise pickle.UnpicklingError(f"a layout {name!r} is no part of an index")
    found: torch.layout = getattr(torch, name.removeprefix("torch."))
    return found


def _check_index(folder: Path, index: Any) -> None:
    """Refuse an index that is none, that leads out of its folder, or whose tensors are larger than all of its files."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

    if not isinstance(index, Metadata):
        raise ValueError("its .metadata is no index")
    if not isinstance(index.state_dict_metadata, dict) or not isinstance(index.storage_data, dict):
        raise ValueError("its .metadata names no tensors")
    room = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    for place in index.storage_data.values():
        name = place.relative_path if isinstance(place, _StorageInfo) else None
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"its .metadata names a file outside of the folder: {name!r}")
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(key, str) or not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise ValueError("its .metadata holds something that is no tensor")
        if isinstance(entry, TensorStorageMetadata):
            room -= math.prod(entry.size) * entry.properties.dtype.itemsize
            if room < 0 or min(entry.size, default=0) < 0:
                raise ValueError("its .metadata names more numbers than its files hold")


def _parsed(origin: str, value: Any) -> SavedOptimizer:
    """The nested form that torch's optimizers use, or the flat one with dotted keys."""
    if isinstance(value, dict) and isinstance(value.get("state"), dict) and isinstance(value.get("param_groups"), list):
        return _checked(origin, value["state"], value["param_groups"])
    if not (isinstance(value, dict) and any(str(key).startswith("param_groups.") for key in value)):
        keys = ", ".join(map(str, list(value)[:5])) if isinstance(value, dict) else type(value).__name__
        raise TrajectoryError(f"{origin}: not the state of an optimizer: expected state and param_groups, found {keys}")
    state: dict[Key, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, item in value.items():
        what, _, rest = str(key).partition(".")
        owner, _, field = rest.rpartition(".")
        if what == "state":
            state.setdefault(owner, {})[field] = item
        else:
            groups.setdefault(owner, {"params": [owner]})[field] = item
    return _checked(origin, state, list(groups.values()))


def _checked(origin: str, state: dict[Any, Any], groups: list[Any]) -> SavedOptimizer:
    """Entries by numbers or names, and groups that list them."""
    right = all(
        isinstance(key, int | str) and isinstance(entry, dict) and all(isinstance(name, str) for name in entry)
        for key, entry in state.items()
    ) and all(
        isinstance(group, dict)
        and all(isinstance(group.get(key, []), list) for key in ("params", "param_names"))
        and "params" in group
        and all(isinstance(key, int | str) for key in [*group["params"], *group.get("param_names", [])])
        and len(group.get("param_names") or group["params"]) == len(group["params"])
        for group in groups
    )
    if not right:
        raise TrajectoryError(f"{origin}: not the state of an optimizer: its entries or groups are not as torch's are")
    return SavedOptimizer(origin, state, groups)
