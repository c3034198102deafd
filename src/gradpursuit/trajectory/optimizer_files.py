"""Optimizer states as trainers write them: `Trainer`, FSDP (whole or sharded), and any named `state_dict`."""

from __future__ import annotations

import io
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradpursuit.errors import TrajectoryError

WAY_ON = (
    'train the run to follow with optim="adamw_torch", or do without moments: gradients.preconditioner: identity, and '
    "no strategy that needs them (less does)"
)
Key = int | str


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
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        if "torchao" in str(error):
            raise NoMomentsError(f"{path}: the low-bit state of a torchao optimizer; {WAY_ON}") from None
        raise TrajectoryError(f"{path}: cannot be read: {' '.join(str(error).split())[:300]}") from None


def read_distributed(folder: Path) -> dict[str, Any]:
    """Everything in a folder of `torch.distributed.checkpoint`, whole, by dotted key.

    Raises:
        TrajectoryError: it is broken.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    class Planner(dcp.DefaultLoadPlanner):
        """Reads what is no tensor as plainly as everything else."""

        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    class Reader(dcp.FileSystemReader):
        """Reads the index without running what it may hold."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (folder / ".metadata").open("rb") as file:
                return _IndexUnpickler(file).load()

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
    except Exception as error:  # torch raises many kinds, some of its own, for one broken folder
        raise TrajectoryError(f"{folder}: cannot be read: {' '.join(str(error).split())[:300]}") from None
    return found


class _IndexUnpickler(pickle.Unpickler):
    """Makes the few kinds of objects that a checkpoint's index consists of."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse all else."""
        if module.startswith(("torch.distributed.checkpoint.", "pathlib")) or (module, name) in (
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
        ):
            return super().find_class(module, name)
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")


def _parsed(origin: str, value: Any) -> SavedOptimizer:
    """The nested form that torch's optimizers use, or the flat one with dotted keys."""
    if isinstance(value, dict) and isinstance(value.get("state"), dict) and isinstance(value.get("param_groups"), list):
        return SavedOptimizer(origin, value["state"], value["param_groups"])
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
    return SavedOptimizer(origin, state, list(groups.values()))
