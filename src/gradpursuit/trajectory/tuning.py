"""What is trained and followed: a LoRA adapter, or chosen linear layers of the model; for a while, then not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradpursuit.config import ModelSection
from gradpursuit.errors import ModelError, RunError, TrajectoryError
from gradpursuit.files import read_json
from gradpursuit.trajectory.expressions import check_time
from gradpursuit.trajectory.followed import embedding_weights, followed_layers, is_linear
from gradpursuit.trajectory.model import attach_lora, attach_peft

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
# Settings of an adapter that leave its gradients what they are, or that `peft` follows by itself.
_FREE = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
_LARGEST_RANK, _LARGEST_ALPHA = 1 << 16, 1e9
_INITIAL = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base model's weights alone


@contextmanager
def tuned(base: PreTrainedModel, config: ModelSection, seed: int, adapter: Path | None = None) -> Iterator[nn.Module]:
    """The model with its trainable parameters; afterwards `base` is again what it was, bit for bit.

    Args:
        base: frozen; changed in place inside the block.
        config: `lora` or `layers` says what is trainable.
        seed: of a fresh adapter.
        adapter: a checkpoint folder whose `adapter_config.json` counts instead of `config.lora`; the weights are
            fresh all the same.

    Raises:
        ModelError: nothing matches, or what matches cannot be followed.
        TrajectoryError: the adapter has a setting that cannot be followed.
    """
    if config.layers is not None:
        with _layers(base, config.layers):
            yield base
        return
    if adapter is not None:
        model = attach_peft(base, adapter_settings(adapter), seed, f"the settings of {adapter / ADAPTER_CONFIG}")
    else:
        assert config.lora is not None  # the configuration has one of the two
        model = attach_lora(base, config.lora, seed)
    try:
        followed_layers(model)  # refuses what cannot be followed
        yield model.to(base.device)
    finally:
        model.unload()
        base.eval()


@contextmanager
def _layers(base: PreTrainedModel, pattern: str) -> Iterator[None]:
    weights = _matching(base, pattern)
    before = [weight.detach().to("cpu", copy=True) for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.requires_grad_(False).copy_(value)
                weight.grad = None
        base.eval()


def _matching(base: PreTrainedModel, pattern: str) -> list[nn.Parameter]:
    """Weights of the linear layers whose names match; everything else that matches is an error."""
    check_time([pattern], [name for name, _ in base.named_modules()], f"model.layers = {pattern!r}")
    matches = {name: module for name, module in base.named_modules() if name and re.fullmatch(pattern, name)}
    holders = {name: module for name, module in matches.items() if next(module.parameters(recurse=False), None)
               is not None}  # fmt: skip
    tied = embedding_weights(base)
    bad = [
        f"{name} ({type(module).__name__})"
        for name, module in holders.items()
        if not is_linear(module) or id(module.weight) in tied
    ]
    if bad:
        raise ModelError(
            f"model.layers = {pattern!r} matches {len(bad)} modules of {type(base).__name__} that cannot be followed "
            f"(such as {', '.join(bad[:3])}): only linear layers can, and not the output layer; narrow the expression"
        )
    if not holders:
        some = [name for name, module in base.named_modules() if is_linear(module)]
        raise ModelError(
            f"model.layers = {pattern!r} matches no linear layer of {type(base).__name__}; the expression must match "
            f"the whole name; linear layers found: {', '.join(some[:8])}{', ...' if len(some) > 8 else ''}"
        )
    return [module.weight for module in holders.values()]


def adapter_settings(folder: Path) -> LoraConfig:
    """The settings in a folder's `adapter_config.json`, for a fresh adapter of the same kind without dropout.

    Raises:
        TrajectoryError: there are none, or one of them cannot be followed.
    """
    from peft import LoraConfig

    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise TrajectoryError(
            f"{path}: not there; copy the adapter's settings to it, or, if layers of the model itself were trained, "
            "name them with model.layers"
        )
    try:
        found = read_json(path)
    except RunError as error:
        raise TrajectoryError(str(error)) from None
    if not isinstance(found, dict):
        raise TrajectoryError(f"{path}: not the settings of an adapter")
    _refuse_settings(path, found)
    kept = {name: found[name] for name in _FREE & found.keys() & LoraConfig.__dataclass_fields__.keys()}
    for name in ("auto_mapping", "runtime_config", "loftq_config", "eva_config"):
        kept.pop(name, None)
    _refuse_sizes(path, kept)
    try:
        return LoraConfig(**{**kept, "lora_dropout": 0.0, "inference_mode": False})
    except Exception as error:  # peft raises many kinds for settings that are none
        raise TrajectoryError(f"{path}: not the settings of an adapter: {' '.join(str(error).split())[:300]}") from None


def _refuse_sizes(path: Path, kept: dict[str, Any]) -> None:
    """Ranks are whole numbers that a layer may have, factors are finite, and names are names."""

    def each(name: str) -> list[tuple[str, Any]]:
        pattern = kept.get(name) or {}
        if not isinstance(pattern, dict):
            raise TrajectoryError(f"{path}: {name} = {str(pattern)[:60]!r} is no table of names and numbers")
        return [(f"{name}.{key}", value) for key, value in pattern.items()]

    for name, value in [("r", kept.get("r", 8)), *each("rank_pattern")]:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_RANK:
            raise TrajectoryError(f"{path}: {name} = {str(value)[:60]} is no rank from 1 to {_LARGEST_RANK}")
    for name, value in [("lora_alpha", kept.get("lora_alpha", 8)), *each("alpha_pattern")]:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < abs(value) < _LARGEST_ALPHA:
            raise TrajectoryError(f"{path}: {name} = {str(value)[:60]} is no factor")
    for name in ("target_modules", "exclude_modules"):
        value = kept.get(name)
        names = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(part, str) for part in names):
            raise TrajectoryError(f"{path}: {name} = {str(value)[:60]} is neither names of modules nor an expression")


def _refuse_settings(path: Path, found: dict[str, Any]) -> None:
    """Whatever is neither harmless nor at its default has an effect that is not followed."""
    from peft import LoraConfig

    if found.get("peft_type") != "LORA":
        raise TrajectoryError(f"{path}: peft_type is {found.get('peft_type')!r}; only LORA adapters can be followed")
    initial = found.get("init_lora_weights", True)
    if not isinstance(initial, bool | str) or initial not in _INITIAL:
        raise TrajectoryError(
            f"{path}: init_lora_weights = {initial!r} changes the base model's weights, so the adapter does not belong "
            "to the model in model.path; train with init_lora_weights=True"
        )
    defaults = LoraConfig()
    for name, value in sorted(found.items()):
        if name in _FREE or name in ("peft_type", "init_lora_weights") or not value:
            continue
        if value != getattr(defaults, name, None):
            fix = "train with bias='none'" if name == "bias" else f"train a plain LoRA adapter, without {name}"
            raise TrajectoryError(f"{path}: {name} = {value!r} cannot be followed; {fix}")
