"""Linear layers whose weights, or whose LoRA matrices, are followed.

At a checkpoint every weight is a constant, so a LoRA layer y = W x + s B A x is computed as the one product
(W + s B A) x: forward and backward pass cost what they cost without an adapter, and the gradients of A and B are made
of the layer's input and output gradient alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpursuit.errors import ModelError

Sink = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Lora:
    """A layer's A [r, in] and B [out, r], and the factor s of their product."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float


class FollowedLinear:
    """One linear layer and what is followed of it: its own weight, or a LoRA adapter.

    Args:
        base: `nn.Linear`, or transformers' `Conv1D`, which keeps its weight transposed.
        lora: the adapter; None: the weight itself is followed.
        names: of the parameters followed: A and B, or the weight.
        dtype: of the products; inputs and weights are cast to it, products are accumulated in float32.
    """

    def __init__(self, base: Any, lora: Lora | None, names: tuple[str, ...], dtype: torch.dtype) -> None:
        self.base, self.lora, self.names, self.dtype = base, lora, names, dtype
        self.transposed = not isinstance(base, nn.Linear)
        self._made_of: tuple[Any, ...] = ()

    def refresh(self) -> None:
        """Make the constants of the present checkpoint, unless nothing has changed."""
        weight, lora = self.base.weight, self.lora
        parts = [weight] if lora is None else [weight, lora.a, lora.b]
        made_of = tuple((part.data_ptr(), part._version) for part in parts)
        if made_of == self._made_of:
            return
        with torch.no_grad():
            full = weight.t() if self.transposed else weight
            if lora is not None:
                full = torch.addmm(full.float(), lora.b.float(), lora.a.float(), alpha=lora.scaling)
                self._a, self._b = ((m.float() * lora.scaling).to(self.dtype) for m in (lora.a, lora.b))
            self._weight = full.to(self.dtype).contiguous()
            bias = self.base.bias
            self._bias = None if bias is None else bias.to(self.dtype)
        self._made_of = made_of

    def forward(self, inputs: Tensor) -> Tensor:
        """W x + b of `inputs [..., in]` in the layer's dtype."""
        return F.linear(inputs, self._weight, self._bias)

    def backward(self, delta: Tensor) -> Tensor:
        """The gradient of the input, for that of the output."""
        return delta @ self._weight

    def gradients(self, delta: Tensor, inputs: Tensor) -> list[tuple[str, Tensor]]:
        """Per-example gradients `[B, *shape]` of what is followed, of `delta [B, L, out]` and `inputs [B, L, in]`."""
        if self.lora is None:
            weight = _outer(inputs, delta) if self.transposed else _outer(delta, inputs)
            return [(self.names[0], weight)]
        values = _outer(delta @ self._b, inputs), _outer(delta, inputs @ self._a.t())
        return list(zip(self.names, values, strict=True))


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Σ_l left_l ⊗ right_l of each example: [B, m, n] of [B, L, m] and [B, L, n], the longer side contiguous."""
    if left.shape[2] > right.shape[2]:
        return torch.bmm(right.transpose(1, 2), left).transpose(1, 2)
    return torch.bmm(left.transpose(1, 2), right)


class Linear(torch.autograd.Function):
    """The layer's product, which hands output gradient and input to a sink instead of forming a weight gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _anchor: Tensor, cast: Tensor, layer: FollowedLinear, sink: Sink) -> Tensor:
        """`_anchor` requires a gradient, so that the backward pass comes by even where the input needs none."""
        ctx.save_for_backward(cast)
        ctx.layer, ctx.sink = layer, sink
        return layer.forward(cast)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        """Feed the sink; pass on the gradient of the input if something below wants it."""
        (inputs,) = ctx.saved_tensors
        delta = deltas[0].to(inputs.dtype)
        ctx.sink(delta, inputs)
        return (ctx.layer.backward(delta) if ctx.needs_input_grad[0] else None), None, None, None, None


def followed_linears(model: nn.Module, dtype: torch.dtype | None) -> dict[nn.Module, FollowedLinear]:
    """The linear layers of `model` that have trainable weights or trainable LoRA adapters.

    Args:
        model: whose trainable parameters are all to be followed.
        dtype: of the products; None: that of each layer's weight.

    Raises:
        ModelError: some trainable parameter is neither, or is part of the output layer; the first is named.
    """
    from gradpursuit.trajectory.model import trainable

    parameters = trainable(model)
    owners = {id(value): name for name, value in parameters.items() if ".modules_to_save." not in name}
    output = model.get_output_embeddings()  # type: ignore[operator]  # it sees labelled positions of all rows at once
    head = set(output.modules()) if output is not None else set()
    found: dict[nn.Module, FollowedLinear] = {}
    for module in model.modules():
        if module in head:
            continue
        lora = _lora_of(module)
        base: Any = module.base_layer if lora else module
        if not is_linear(base):
            continue
        names = [owners.get(id(part)) for part in ((lora.a, lora.b) if lora else (base.weight,))]
        if None not in names:
            found[module] = FollowedLinear(base, lora, tuple(map(str, names)), dtype or base.weight.dtype)
    left = sorted(set(parameters) - {name for layer in found.values() for name in layer.names})
    if left:
        raise ModelError(
            f"{len(left)} trainable parameters are neither weights of linear layers nor of plain LoRA adapters on "
            f"them (first: '{left[0]}'); DoRA, modules_to_save, biases, adapted embeddings and output layers "
            "are not supported: use plain LoRA"
        )
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes W x + b and nothing else."""
    from transformers.pytorch_utils import Conv1D

    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _lora_of(module: nn.Module) -> Lora | None:
    """The one active adapter of a `peft` layer, if it is plain: low-rank matrices without biases, not merged."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer) or len(module.active_adapters) != 1 or module.merged:
        return None
    name = module.active_adapters[0]
    if name not in module.lora_A or module.lora_variant.get(name) is not None:
        return None
    a, b = module.lora_A[name], module.lora_B[name]
    if not is_linear(a) or a.bias is not None or b.bias is not None:
        return None
    return Lora(a.weight, b.weight, float(module.scaling[name]))
