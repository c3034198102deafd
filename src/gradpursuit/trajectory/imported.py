"""Trajectories that already exist: checkpoints of a Trainer, of FSDP, or of ours, turned into ours."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gradpursuit.errors import ConfigError, RunError, TrajectoryError
from gradpursuit.files import read_json, sha256_of
from gradpursuit.trajectory.checkpoint import (
    STATE,
    Checkpoint,
    is_number,
    read_checkpoint,
    read_trajectory,
    write_checkpoint,
)
from gradpursuit.trajectory.foreign_weights import put_foreign_weights
from gradpursuit.trajectory.optimizer import AdamState, NoMoments, adam_state, learning_rate
from gradpursuit.trajectory.optimizer_files import NoMomentsError, SavedOptimizer, read_optimizer
from gradpursuit.trajectory.tuning import ADAPTER_CONFIG, adapter_settings

if TYPE_CHECKING:
    from gradpursuit.config import RunConfig

logger = logging.getLogger("gradpursuit")
TRAINER_STATE = "trainer_state.json"
_LARGEST_RATE = 1e6
# What is read of a checkpoint folder, and so belongs to its content.
_READ = (
    ADAPTER_CONFIG, STATE, TRAINER_STATE, "adapter_model.*", "weights.safetensors", "moments.safetensors",
    "model*.safetensors", "model.safetensors.index.json", "optimizer.pt", "optimizer.bin", "optimizer_0/*",
    "pytorch_model_fsdp_0/*",
)  # fmt: skip


def checkpoint_folders(paths: Sequence[str]) -> list[Path]:
    """The folders that `warmup.trajectory` means, oldest first.

    Raises:
        TrajectoryError: one is not there, or holds no checkpoint.
    """
    folders = [_folder(path) for path in paths]
    if len(folders) == 1:
        try:
            # int() refuses numbers of thousands of digits, which no step has
            numbered = [(re.fullmatch(r"checkpoint-(\d{1,18})", path.name), path) for path in folders[0].iterdir()]
            inside = sorted((int(match[1]), path) for match, path in numbered if match and path.is_dir())
        except OSError as error:
            raise TrajectoryError(f"warmup.trajectory: {folders[0]}: cannot be read: {error}") from None
        folders = [path for _, path in inside] or folders
    for folder in folders:
        if not any((folder / name).exists() for name in (STATE, TRAINER_STATE, ADAPTER_CONFIG, "optimizer.bin")):
            raise TrajectoryError(
                f"warmup.trajectory: {folder}: no checkpoint: neither {STATE} nor {TRAINER_STATE} is there; give "
                "checkpoint folders, oldest first, or one folder that holds checkpoint-*"
            )
    return folders


def _folder(path: str) -> Path:
    """The folder of that name, if it is one."""
    try:
        folder = Path(path).expanduser()
        folder.resolve()  # a link that leads to itself cannot be
        found = folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise TrajectoryError(f"warmup.trajectory: {path!r}: cannot be read: {error}") from None
    if not found:
        raise TrajectoryError(f"warmup.trajectory: {folder}: no such folder")
    return folder


def check_trajectory(config: RunConfig) -> None:
    """Refuse before any work what can be known from small files: places, and the adapter's settings.

    Raises:
        ConfigError: a checkpoint lies where the run would delete it.
        TrajectoryError: a folder is not there, or its adapter cannot be followed.
    """
    folders = checkpoint_folders(config.warmup.trajectory)
    own = (Path(config.run_dir or ".") / "trajectory").resolve()
    for folder in folders:
        if folder.resolve().is_relative_to(own):
            raise ConfigError(
                f"warmup.trajectory: {folder} is the run's own; copy it elsewhere, or use another run_dir"
            )
    if config.model.layers is None:
        _one_adapter(folders)
    elif adapted := [folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()]:
        raise ConfigError(f"warmup.trajectory: {adapted[0]} holds an adapter, but model.layers is set; leave it out")


def trajectory_hashes(paths: Sequence[str]) -> dict[str, str]:
    """sha256 of every file that is read of a trajectory, by checkpoint number and name.

    Raises:
        TrajectoryError: a folder is not there, or holds no checkpoint.
    """
    found = {}
    for number, folder in enumerate(checkpoint_folders(paths), start=1):
        for file in sorted({file for pattern in _READ for file in folder.glob(pattern) if file.is_file()}):
            found[f"{number}/{file.relative_to(folder).as_posix()}"] = sha256_of(file)
    return found


def import_trajectory(model: nn.Module, paths: Sequence[str], folder: Path, need_moments: bool) -> list[Checkpoint]:
    """Write the checkpoints of another run to `folder`, as a warm-up would have.

    Args:
        model: with an adapter of the same settings or the same layers trainable; its weights are replaced.
        paths: as in `warmup.trajectory`.
        folder: gets `checkpoint-1` ... `checkpoint-T`.
        need_moments: refuse checkpoints without Adam moments; otherwise they are written without.

    Raises:
        TrajectoryError: a file is missing or broken, does not fit the model, or the order is wrong.
        NoMomentsError: moments are needed, and there are none.
    """
    before: _Point | None = None
    for number, source in enumerate(checkpoint_folders(paths), start=1):
        point = _read(source, model, before)
        if before is not None and point.adam.step <= before.adam.step:
            raise TrajectoryError(
                f"warmup.trajectory: {source} was written after {point.adam.step} steps, the one before it after "
                f"{before.adam.step}; list the checkpoints oldest first"
            )
        if isinstance(point.adam, NoMoments):
            if need_moments:
                raise NoMomentsError(point.adam.reason)
            logger.warning("%s: %s", source, point.adam.reason)
        put_foreign_weights(source, model)
        write_checkpoint(folder / f"checkpoint-{number}", model, point.adam, point.learning_rate)
        logger.info("%s: step %d, learning rate %.3g", source, point.adam.step, point.learning_rate)
        before = point
    return read_trajectory(folder)


@dataclass(frozen=True)
class _Point:
    """What a checkpoint tells beside its weights; `end_rate` is the optimizer's learning rate when it was written."""

    adam: AdamState | NoMoments
    learning_rate: float
    global_step: int
    end_rate: float | None = None


def _read(source: Path, model: nn.Module, before: _Point | None) -> _Point:
    if (source / STATE).is_file():
        own = read_checkpoint(source)
        adam = own.adam(model) if own.no_moments is None else NoMoments(own.no_moments, own.step)
        return _Point(adam, own.learning_rate, own.step)
    state = _trainer_state(source)
    saved, found = _moments(source, model)
    step = int(state.get("global_step", 0)) or (found.step if isinstance(found, AdamState) else 0)
    if step <= 0:
        raise TrajectoryError(f"{source}: neither {TRAINER_STATE} nor an optimizer says how many steps were made")
    adam = NoMoments(found, step) if isinstance(found, str) else found
    end_rate = learning_rate(saved) if saved else None
    rate = _logged_rate(state, before.global_step if before else 0, step)
    if rate is None:
        rate = _unlogged_rate(source, saved, before)
    if not 0 < rate < _LARGEST_RATE:
        weight = "nothing" if rate == 0 else "what no checkpoint can"
        raise TrajectoryError(
            f"{source}: the learning rate up to there is {rate}, so the checkpoint would weigh {weight}; leave it out "
            "of warmup.trajectory"
        )
    return _Point(adam, rate, step, end_rate)


def _moments(source: Path, model: nn.Module) -> tuple[SavedOptimizer | None, AdamState | str]:
    """The optimizer, if it can be read, and its moments or why there are none."""
    saved = None
    try:
        saved = read_optimizer(source)
        return saved, adam_state(saved, model)
    except NoMomentsError as error:
        return saved, str(error)


def _trainer_state(source: Path) -> dict[str, Any]:
    if not (source / TRAINER_STATE).is_file():
        return {}
    try:
        state = read_json(source / TRAINER_STATE)
    except RunError as error:
        raise TrajectoryError(str(error)) from None
    step = state.get("global_step") if isinstance(state, dict) else None
    if not is_number(step) or not isinstance(step, int) or not 0 <= step < 1e15:
        raise TrajectoryError(
            f"{source / TRAINER_STATE}: not the state of a Trainer: no global_step, or no whole number"
        )
    history = state.get("log_history") or []
    if not isinstance(history, list):
        raise TrajectoryError(f"{source / TRAINER_STATE}: log_history is no list")
    for entry in history:
        if isinstance(entry, dict) and "learning_rate" in entry:
            for key in ("learning_rate", "step"):
                value = entry.get(key, 0)
                if not is_number(value) or value < 0:
                    raise TrajectoryError(
                        f"{source / TRAINER_STATE}: log_history: {key} is {str(value)[:60]}, no number"
                    )
    return state


def _logged_rate(state: dict[str, Any], after: int, upto: int) -> float | None:
    """Mean of the learning rates logged for the steps in (after, upto]; None if there is none."""
    entries = [entry for entry in state.get("log_history") or [] if isinstance(entry, dict)]
    rates = [
        float(entry["learning_rate"])
        for entry in entries
        if "learning_rate" in entry and after < int(entry.get("step", 0)) <= upto
    ]
    return sum(rates) / len(rates) if rates else None


def _unlogged_rate(source: Path, saved: SavedOptimizer | None, before: _Point | None) -> float:
    """Mean of the optimizer's learning rate at both ends of the interval: at its end alone it may have decayed to 0."""
    end = learning_rate(saved) if saved else None
    if saved is None or end is None:
        raise TrajectoryError(
            f"{source}: the learning rate is known neither from {TRAINER_STATE} (log_history) nor from an optimizer"
        )
    begin = before.end_rate if before else learning_rate(saved, "initial_lr")
    rate = end if begin is None else (begin + end) / 2
    logger.warning(
        "%s: no learning rate was logged since the checkpoint before (logging_steps larger than save_steps?); %.3g is "
        "used, from the optimizer's rate when the checkpoints were written",
        source, rate,
    )  # fmt: skip
    return rate


def _one_adapter(folders: Sequence[Path]) -> None:
    """All checkpoints must be of one adapter: settings such as alpha show in no shape."""
    first = adapter_settings(folders[0]).to_dict()
    for folder in folders[1:]:
        other = adapter_settings(folder).to_dict()
        for name in ("r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern"):
            if other[name] != first[name]:
                raise TrajectoryError(
                    f"{folder / ADAPTER_CONFIG}: {name} = {other[name]!r}, but {first[name]!r} in {folders[0]}; a "
                    "trajectory is of one adapter"
                )
