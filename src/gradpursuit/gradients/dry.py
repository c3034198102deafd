"""One pass of two short rows, before any training: what would go wrong with a model's gradients is known then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradpursuit.errors import GradPursuitError, ModelError, is_out_of_memory
from gradpursuit.gradients.per_example import PerExampleGradients
from gradpursuit.trajectory.followed import FollowedLayer, followed_layers, listed_names, setting_without
from gradpursuit.trajectory.loss import SupervisedLoss, collate
from gradpursuit.trajectory.model import Compute, pad_id, trainable

_LENGTHS = (14, 7)  # padded to 16 and 8: even a model of very few positions takes them
_TOLERANCE = 0.02  # of what float32 computes in another order; what is wrong is wrong by far more


@dataclass(frozen=True)
class _Short:
    """What a pass reads of a row."""

    input_ids: list[int]
    labels: list[int]


def dry_pass(model: nn.Module, compute: Compute, tokens: Sequence[int]) -> None:
    """See that two short rows in one batch have the losses and the gradients that each of them has alone.

    The gradients of the rows alone are those of plain autograd, in float32. The model is left as it was.

    Args:
        model: with trainable adapters or layers.
        compute: whose device the model is on.
        tokens: some ids of real rows; they are repeated if they are few.

    Raises:
        ModelError: the model cannot take the rows; layers see tokens without the row that they belong to (all are
            named, with the setting that leaves them out); or what the model makes of a row depends on the others.
    """
    model.eval()
    plain = Compute(compute.device, None)
    try:
        with _moved(model):
            rows = _rows(tokens)
            _refuse_flat(model, plain, rows)
            _compare(model, plain, rows)
    except GradPursuitError:
        raise
    except Exception as error:  # the model's own code raises many kinds
        if is_out_of_memory(error):
            raise ModelError(
                f"two rows of {_LENGTHS[0]} tokens do not fit into the memory of {compute.device}"
            ) from None
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"{_kind(model)} cannot make a forward and backward pass over two rows of {_LENGTHS[0]} tokens: {reason}"
            f"{_way_on(model)}"
        ) from error


def some_tokens(rows: Any) -> list[int]:
    """Ids of the first rows, as many as :func:`dry_pass` looks at."""
    found: list[int] = []
    for row in rows:
        found += row.input_ids
        if len(found) >= sum(_LENGTHS):
            break
    return found


def _rows(tokens: Sequence[int]) -> list[_Short]:
    ids = list(tokens)
    while len(ids) < sum(_LENGTHS):
        ids += list(tokens)
    made, start = [], 0
    for length in _LENGTHS:
        made.append(_Short(ids[start : start + length], ids[start : start + length]))
        start += length
    return made


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """Small numbers in parameters that are all zero, as a fresh adapter's B is: they hide the gradient of A."""
    zero = [parameter for parameter in trainable(model).values() if not parameter.any()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in zero:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()


def _refuse_flat(model: nn.Module, compute: Compute, rows: Sequence[_Short]) -> None:
    """All layers at once whose input is not [B, L, ...]."""
    layers, flat = followed_layers(model), list[FollowedLayer]()

    def look(layer: FollowedLayer, given: tuple[Tensor, ...]) -> None:
        if given and (given[0].dim() < 3 or len(given[0]) != len(rows)):
            flat.append(layer)

    with ExitStack() as stack, torch.no_grad():
        for module, layer in layers.items():
            hook = module.register_forward_pre_hook(lambda _module, given, layer=layer: look(layer, given))
            stack.callback(hook.remove)
        SupervisedLoss(model, compute)(collate(rows, pad_id(model)))
    if flat:
        names = [layer.names[0].split(".lora_")[0].removesuffix(".weight") for layer in flat]
        raise ModelError(
            f"{len(set(names))} layers of {_kind(model)} get their tokens without a batch dimension "
            f"({listed_names(names)}), so that the gradients of examples cannot be told apart; leave them out: "
            f"{setting_without(layers.values(), [layer.names[0] for layer in flat])}"
        )


def _compare(model: nn.Module, compute: Compute, rows: Sequence[_Short]) -> None:
    loss, pad, parameters = SupervisedLoss(model, compute), pad_id(model), trainable(model)
    alone, expected = [], []
    for row in rows:
        nll = loss(collate([row], pad))[0].sum()
        alone.append(nll.detach())
        found = torch.autograd.grad(nll, list(parameters.values()), allow_unused=True)
        expected.append(dict(zip(parameters, found, strict=True)))
    wrong, right = torch.zeros(2, len(rows), dtype=torch.float64)
    worst: dict[str, float] = {}

    def consume(name: str, gradient: Tensor) -> None:
        for i in range(len(rows)):
            value = expected[i].pop(name)
            value = torch.zeros_like(parameters[name]) if value is None else value.float()
            off = float((gradient[i].view_as(value) - value).norm())
            worst[name] = max(worst.get(name, 0.0), off)
            wrong[i] += off**2
            right[i] += float(value.norm()) ** 2

    with PerExampleGradients(model).capture(consume, len(rows)):
        losses = loss(collate(rows, pad))[0]
        losses.sum().backward()
    together = losses.detach()
    if not torch.allclose(together, torch.stack(alone), rtol=_TOLERANCE, atol=1e-4, equal_nan=True):
        raise ModelError(
            f"what {_kind(model)} makes of a row depends on the other rows of its batch: the loss of a row of "
            f"{_LENGTHS[1]} tokens is {float(alone[1]):.4g} alone, and {float(together[1]):.4g} beside one of "
            f"{_LENGTHS[0]}; its examples cannot be told apart"
        )
    lost = sorted({name for left in expected for name, value in left.items() if value is not None and value.any()})
    if lost or bool((wrong.sqrt() > _TOLERANCE * right.sqrt() + 1e-6).any()):
        names = lost or sorted(worst, key=lambda name: worst[name], reverse=True)[:3]
        raise ModelError(
            f"the per-example gradients of {_kind(model)} are not those that each row has alone (of "
            f"{listed_names(names)}); leave these layers out: {setting_without(followed_layers(model).values(), names)}"
        )


def _way_on(model: nn.Module) -> str:
    """Where adapters sit on layers that are more than a product, such as routers: the setting without them."""
    layers = followed_layers(model)
    own = [layer for layer in layers.values() if layer.lora is None and ".lora_" in layer.names[0]]
    if not own:
        return ""
    names = [layer.names[0].split(".lora_")[0] for layer in own]
    setting = setting_without(layers.values(), [layer.names[0] for layer in own])
    return f"; the adapter is on layers that are more than a product ({listed_names(names)}): leave them out: {setting}"


def _kind(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
