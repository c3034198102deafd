"""A trajectory on disk: weights, Adam moments by parameter name, step and learning rate of every checkpoint.

One folder per checkpoint. Of an adapter, `adapter_model.safetensors` and `adapter_config.json` as `peft` reads them; of
layers of the model itself, `weights.safetensors` by the model's own parameter names. Beside them
`moments.safetensors` (`m.<parameter>` and `v.<parameter>`), and `state.json`. All tensors are float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gradpursuit.errors import RunError, TrajectoryError
from gradpursuit.files import read_json, write_atomic, write_folder, write_json
from gradpursuit.trajectory.model import trainable
from gradpursuit.trajectory.optimizer import AdamState, LackingMoments, NoMoments, check_constants
from gradpursuit.trajectory.tuning import ADAPTER_CONFIG

ADAPTER, WEIGHTS, MOMENTS, STATE = (
    "adapter_model.safetensors",
    "weights.safetensors",
    "moments.safetensors",
    "state.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """One point of the trajectory.

    Attributes:
        folder: where its files lie.
        step: optimizer steps taken.
        learning_rate: mean learning rate over the steps since the previous checkpoint (η_t).
        beta1, beta2, eps: of the optimizer; None where there are no moments.
        no_moments: why there are none; None where there are.
    """

    folder: Path
    step: int
    learning_rate: float
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    no_moments: str | None = None

    def load_adapter(self, model: nn.Module) -> None:
        """Put this checkpoint's weights, of an adapter or of layers, into the trainable parameters of `model`.

        Raises:
            TrajectoryError: the file is broken, or its parameters are not those of the model.
        """
        path = self.folder / (ADAPTER if (self.folder / ADAPTER_CONFIG).is_file() else WEIGHTS)
        put_weights(path, _load(path), model)

    def adam(self, model: nn.Module) -> AdamState:
        """The optimizer's moments, on the model's device; of a checkpoint without any, a state that says so when asked.

        Raises:
            TrajectoryError: the file is broken, or a moment is missing or of another shape than its parameter.
        """
        if self.beta1 is None or self.beta2 is None or self.eps is None:
            lacking = LackingMoments(f"{self.folder}: {self.no_moments}")
            return AdamState(lacking, lacking, self.step, 0.0, 0.0, 0.0)
        path = self.folder / MOMENTS
        tensors = _load(path)
        parameters = trainable(model)
        moments: dict[str, dict[str, Tensor]] = {}
        for kind in ("m", "v"):
            found = {name[2:]: value for name, value in tensors.items() if name.startswith(f"{kind}.")}
            _check_fit(path, found, parameters)
            moments[kind] = {name: found[name].to(p.device) for name, p in parameters.items()}
        return AdamState(moments["m"], moments["v"], self.step, self.beta1, self.beta2, self.eps)


def put_weights(path: Path, weights: dict[str, Tensor], model: nn.Module) -> None:
    """Copy weights, read from `path`, into the trainable parameters of `model`.

    Raises:
        TrajectoryError: they are not those of the model, by name or shape.
    """
    parameters = trainable(model)
    _check_fit(path, weights, parameters)
    for name in parameters:
        value = weights[name]
        if not value.dtype.is_floating_point or value.layout != torch.strided or not bool(value.isfinite().all()):
            raise TrajectoryError(
                f"{path}: '{name}' ({value.dtype}) holds numbers that are not finite, or is no plain tensor of numbers "
                "with a fraction; such weights cannot be followed"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def write_checkpoint(folder: Path, model: nn.Module, adam: AdamState | NoMoments, learning_rate: float) -> None:
    """Write one checkpoint folder; it appears under its name only when it is whole.

    Args:
        folder: `checkpoint-<t>`; replaced if it is there.
        model: with the trainable weights to keep.
        adam: the optimizer's moments, or why there are none.
        learning_rate: mean over the steps since the previous checkpoint.
    """
    from peft import PeftModel

    parameters = trainable(model)
    state: dict[str, Any] = {"step": adam.step, "learning_rate": learning_rate}
    with write_folder(folder) as part:
        if isinstance(adam, NoMoments):
            state["no_moments"] = adam.reason
        else:
            kinds = {"m": adam.m, "v": adam.v}
            _save(part / MOMENTS, {f"{kind}.{name}": values[name] for kind, values in kinds.items() for name in values})
            state.update(beta1=adam.beta1, beta2=adam.beta2, eps=adam.eps)
        write_json(part / STATE, state)
        if isinstance(model, PeftModel):
            _save(part / ADAPTER, dict(parameters))
            model.peft_config[model.active_adapter].save_pretrained(str(part))
            _sort_lists(part / ADAPTER_CONFIG)
        else:
            _save(part / WEIGHTS, dict(parameters))


def read_trajectory(folder: Path) -> list[Checkpoint]:
    """The checkpoints of `folder`, in order.

    Raises:
        TrajectoryError: there are none, or one lacks a value.
    """
    checkpoints: list[Checkpoint] = []
    while (path := folder / f"checkpoint-{len(checkpoints) + 1}").is_dir():
        checkpoints.append(read_checkpoint(path))
    if not checkpoints:
        raise TrajectoryError(f"{folder}: no checkpoint-1; run the warm-up first")
    return checkpoints


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in one folder.

    Raises:
        TrajectoryError: `state.json` is missing or lacks a value.
    """
    try:
        state = read_json(path / STATE)
    except RunError as error:
        raise TrajectoryError(f"{error}; or run the warm-up again") from None
    if not isinstance(state, dict):
        state = {}
    reason = state.get("no_moments")
    names = ["step", "learning_rate", *([] if isinstance(reason, str) else ["beta1", "beta2", "eps"])]
    wrong = [name for name in names if not is_number(state.get(name))]
    if wrong:
        raise TrajectoryError(f"{path / STATE}: {', '.join(wrong)} missing or no number")
    if not 1 <= state["step"] < 1e15 or not state["learning_rate"] > 0:
        raise TrajectoryError(f"{path / STATE}: step {state['step']} at a rate of {state['learning_rate']} cannot be")
    if not isinstance(reason, str):
        check_constants(str(path / STATE), state["beta1"], state["beta2"], state["eps"])
    return Checkpoint(path, **{name: state[name] for name in names}, no_moments=reason)


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number, small enough to reckon with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Step, learning rate and optimizer constants as JSON values."""
    return {name: value for name, value in asdict(checkpoint).items() if name != "folder" and value is not None}


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
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise TrajectoryError(f"{path}: cannot be read: {error}; run the warm-up again") from None


def _check_fit(path: Path, found: dict[str, Tensor], parameters: dict[str, Any]) -> None:
    """Names and shapes must be those of the model's trainable parameters."""
    missing = sorted(set(parameters) - set(found))
    extra = sorted(set(found) - set(parameters))
    if missing or extra:
        name, state = (missing[0], "missing") if missing else (extra[0], "not in the model")
        raise TrajectoryError(
            f"{path}: does not fit the model's adapter or layers: {len(missing)} parameters missing, {len(extra)} "
            f"unknown (first: '{name}' is {state}); model.lora (or model.layers) must be as it was when the checkpoint "
            "was made"
        )
    for name, parameter in parameters.items():
        if found[name].shape != parameter.shape:
            raise TrajectoryError(
                f"{path}: '{name}' has shape {tuple(found[name].shape)}, in the model "
                f"{tuple(parameter.shape)}; model.lora (or model.layers) must be as it was when the checkpoint was made"
            )
