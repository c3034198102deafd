"""A trajectory on disk: adapter, Adam moments by parameter name, step and learning rate of every checkpoint.

One folder per checkpoint: `adapter_model.safetensors` and `adapter_config.json` as `peft` reads them,
`moments.safetensors` (`m.<parameter>` and `v.<parameter>`, float32), and `state.json`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gradpursuit.errors import RunError, TrajectoryError
from gradpursuit.files import read_json, write_atomic, write_folder, write_json
from gradpursuit.trajectory.model import trainable

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class AdamState:
    """Moments of one checkpoint: `m` and `v` by parameter name, after `step` optimizer steps."""

    m: dict[str, Tensor]
    v: dict[str, Tensor]
    step: int
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class Checkpoint:
    """One point of the trajectory.

    Attributes:
        folder: where its files lie.
        step: optimizer steps taken.
        learning_rate: mean learning rate over the steps since the previous checkpoint (η_t).
        beta1, beta2, eps: of the optimizer.
    """

    folder: Path
    step: int
    learning_rate: float
    beta1: float
    beta2: float
    eps: float

    def load_adapter(self, model: PeftModel) -> None:
        """Put this checkpoint's adapter weights into `model`.

        Raises:
            TrajectoryError: the file is broken, or its parameters are not those of the model.
        """
        weights = _load(self.folder / "adapter_model.safetensors")
        parameters = trainable(model)
        _check_fit(self.folder / "adapter_model.safetensors", weights, parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])

    def adam(self, model: PeftModel) -> AdamState:
        """The optimizer's moments, on the model's device.

        Raises:
            TrajectoryError: the file is broken, or a moment is missing or of another shape than its parameter.
        """
        path = self.folder / "moments.safetensors"
        tensors = _load(path)
        parameters = trainable(model)
        moments: dict[str, dict[str, Tensor]] = {}
        for kind in ("m", "v"):
            found = {name[2:]: value for name, value in tensors.items() if name.startswith(f"{kind}.")}
            _check_fit(path, found, parameters)
            moments[kind] = {name: found[name].to(p.device) for name, p in parameters.items()}
        return AdamState(moments["m"], moments["v"], self.step, self.beta1, self.beta2, self.eps)


def write_checkpoint(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write one checkpoint folder; it appears under its name only when it is whole.

    Args:
        folder: `checkpoint-<t>`; replaced if it is there.
        model: with the adapter to keep.
        optimizer: AdamW, whose moments are read.
        state: `step` and `learning_rate`, for `state.json`.

    Raises:
        TrajectoryError: the optimizer holds no Adam moments.
    """
    parameters = trainable(model)
    tensors = {}
    for name, parameter in parameters.items():
        moments = optimizer.state.get(parameter, {})
        if "exp_avg" not in moments or "exp_avg_sq" not in moments:
            raise TrajectoryError(
                f"the optimizer ({type(optimizer).__name__}) holds no Adam moments for {name}; use AdamW"
            )
        tensors[f"m.{name}"] = moments["exp_avg"]
        tensors[f"v.{name}"] = moments["exp_avg_sq"]
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    with write_folder(folder) as part:
        _save(part / "moments.safetensors", tensors)
        _save(part / "adapter_model.safetensors", dict(parameters))
        write_json(part / "state.json", {**state, "beta1": beta1, "beta2": beta2, "eps": group["eps"]})
        model.peft_config["default"].save_pretrained(str(part))
        _sort_lists(part / "adapter_config.json")


def read_trajectory(folder: Path) -> list[Checkpoint]:
    """The checkpoints of `folder`, in order.

    Raises:
        TrajectoryError: there are none, or one lacks a value.
    """
    checkpoints = []
    index = 1
    while (path := folder / f"checkpoint-{index}").is_dir():
        try:
            state = read_json(path / "state.json")
        except RunError as error:
            raise TrajectoryError(f"{error}; or run the warm-up again") from None
        names = [name for name in Checkpoint.__dataclass_fields__ if name != "folder"]
        wrong = [name for name in names if not isinstance(state, dict) or not isinstance(state.get(name), int | float)]
        if wrong:
            raise TrajectoryError(f"{path / 'state.json'}: {', '.join(wrong)} missing or no number")
        checkpoints.append(Checkpoint(path, **{name: state[name] for name in names}))
        index += 1
    if not checkpoints:
        raise TrajectoryError(f"{folder}: no checkpoint-1; run the warm-up first")
    return checkpoints


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Step, learning rate and optimizer constants as JSON values."""
    return {name: value for name, value in asdict(checkpoint).items() if name != "folder"}


def _sort_lists(path: Path) -> None:
    """Order the names in an adapter's settings: `peft` writes its sets in an order that changes from run to run."""
    config = read_json(path)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    write_json(path, config)


def _save(path: Path, tensors: dict[str, Any]) -> None:
    payload = save({name: value.detach().to("cpu", torch.float32).contiguous() for name, value in tensors.items()})
    with write_atomic(path) as file:
        file.write(payload)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise TrajectoryError(f"{path}: not there; run the warm-up again") from None
    except (SafetensorError, OSError) as error:
        raise TrajectoryError(f"{path}: cannot be read: {error}; run the warm-up again") from None


def _check_fit(path: Path, found: dict[str, Tensor], parameters: dict[str, Any]) -> None:
    """Names and shapes must be those of the model's trainable parameters."""
    missing = sorted(set(parameters) - set(found))
    extra = sorted(set(found) - set(parameters))
    if missing or extra:
        name, state = (missing[0], "missing") if missing else (extra[0], "not in the model")
        raise TrajectoryError(
            f"{path}: does not fit the model's adapter: {len(missing)} parameters missing, {len(extra)} unknown "
            f"(first: '{name}' is {state}); model.lora must be as it was when the checkpoint was made"
        )
    for name, parameter in parameters.items():
        if found[name].shape != parameter.shape:
            raise TrajectoryError(
                f"{path}: '{name}' has shape {tuple(found[name].shape)}, the model's adapter "
                f"{tuple(parameter.shape)}; model.lora must be as it was when the checkpoint was made"
            )
