"""What can be followed of a model: the weights of its linear layers, or plain LoRA adapters on them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradpursuit.errors import ModelError
from gradpursuit.trajectory.model import trainable


@dataclass(frozen=True)
class Lora:
    """A layer's A [r, in] and B [out, r], and the factor s of their product."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float


@dataclass(frozen=True)
class FollowedLayer:
    """One layer and what is followed of it.

    Attributes:
        base: the linear layer, without its adapter.
        lora: the adapter; None: the weight itself is followed.
        names: of the parameters followed: A and B, or the weight.
    """

    base: Any
    lora: Lora | None
    names: tuple[str, ...]


def followed_layers(model: nn.Module) -> dict[nn.Module, FollowedLayer]:
    """The layers of `model` that have trainable weights or trainable LoRA adapters, all of which can be followed.

    Raises:
        ModelError: nothing is trainable, or some trainable parameter is not the weight of a plain linear layer or LoRA
            matrix, or belongs to the output layer or the embeddings; the first is named.
    """
    parameters = trainable(model)
    if not parameters:
        raise ModelError(f"{type(model).__name__} has no trainable parameters, so there is nothing to follow")
    _refuse_experts(model)
    owners = {id(value): name for name, value in parameters.items() if ".modules_to_save." not in name}
    output = model.get_output_embeddings()  # type: ignore[operator]  # it sees labelled positions of all rows at once
    outside = set(output.modules()) if output is not None else set()
    tied = embedding_weights(model)
    found: dict[nn.Module, FollowedLayer] = {}
    for module in model.modules():  # an adapter before its matrices
        if module in outside:
            continue
        if lora := lora_of(module):
            outside |= set(module.modules()) - {module}
            layer = FollowedLayer(module.base_layer, lora, _names(owners, lora.a, lora.b))
        elif is_linear(module) and id(module.weight) not in tied:
            layer = FollowedLayer(module, None, _names(owners, module.weight))
        else:
            continue
        if layer.names:
            found[module] = layer
    if left := sorted(set(parameters) - {name for layer in found.values() for name in layer.names}):
        raise ModelError(
            f"{len(left)} trainable parameters cannot be followed (first: '{left[0]}'): only the weights of linear "
            "layers and the matrices of LoRA on them can, not biases, norms, embeddings, the output layer, "
            "modules_to_save, DoRA or other kinds of adapters; leave these out of training "
            "(model.lora.target_modules, model.layers), and use plain LoRA"
        )
    return found


def _refuse_experts(model: nn.Module) -> None:
    """Refuse adapters on bare parameters: as peft puts them on experts and their gates, which transformers keeps as
    parameters. Their product with the weight is made without calling any layer."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, ParamWrapper)]
    if not wrapped:
        return
    names = sorted({f"{_place(name)}.{module.parameter_name}" for name, module in wrapped})
    plain = [name for name, module in model.named_modules() if isinstance(module, LoraLayer) and lora_of(module)]
    fix = f"model.lora.target_modules: [{', '.join(_leaves(plain))}]" if plain else "model.layers"
    raise ModelError(
        f"the adapter is on {len(names)} bare parameters, such as the experts of a mixture and their gates "
        f"({listed_names(names)}): their gradients cannot be told apart by example; put it on linear layers alone: "
        f"{fix}"
    )


def _place(name: str) -> str:
    """A module's name in the model itself, without what the adapter adds."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _leaves(names: Iterable[str]) -> list[str]:
    """The last parts of names, each once."""
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def listed_names(names: Sequence[str], most: int = 8) -> str:
    """Names for a message: those of layers that repeat are said once, with * for their numbers."""
    short = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", _place(name)) for name in names))
    return ", ".join(short[:most]) + (f" and {len(short) - most} more" if len(short) > most else "")


def setting_without(layers: Iterable[FollowedLayer], names: Collection[str]) -> str:
    """The setting under which the layers of some parameters are not trained, and all others are.

    Args:
        layers: all that are followed.
        names: of parameters of those to leave out.
    """
    every = list(layers)
    if not any(".lora_" in layer.names[0] for layer in every):
        return "narrow model.layers"

    def ends(found: Iterable[FollowedLayer]) -> set[str]:
        return set(_leaves(layer.names[0].split(".lora_")[0] for layer in found))

    left = ends(every) - ends(layer for layer in every if not set(layer.names).isdisjoint(names))
    return f"model.lora.target_modules: [{', '.join(sorted(left))}]" if left else "name other model.lora.target_modules"


def _names(owners: Mapping[int, str], *parts: Any) -> tuple[str, ...]:
    """The names of a layer's parameters, if all of them are trained."""
    names = [owners.get(id(part), "") for part in parts]
    return tuple(names) if all(names) else ()


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes W x + b and nothing else."""
    from transformers.pytorch_utils import Conv1D

    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def embedding_weights(model: nn.Module) -> set[int]:
    """Ids of the weights that embed tokens or make the logits."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    return {id(layer.weight) for layer in layers if hasattr(layer, "weight")}


def lora_of(module: Any) -> Lora | None:
    """The one active adapter of a `peft` layer, if it is plain: low-rank matrices without biases, not merged.

    On a layer that is no plain product, such as a quantized one, A and B are linear layers of their own.
    """
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer) or len(module.active_adapters) != 1 or module.merged:
        return None
    name = module.active_adapters[0]
    if name not in module.lora_A or module.lora_variant.get(name) is not None:
        return None
    a, b = module.lora_A[name], module.lora_B[name]
    if not is_linear(module.base_layer) or not is_linear(a) or a.bias is not None or b.bias is not None:
        return None
    return Lora(a.weight, b.weight, float(module.scaling[name]))
