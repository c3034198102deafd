"""Linear layers whose weights, or whose LoRA matrices, are followed.

At a checkpoint every weight is a constant, so a LoRA layer y = W x + s B A x is computed as the one product
(W + s B A) x: forward and backward pass cost what they cost without an adapter, and the gradients of A and B are made
of the layer's input and output gradient alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpursuit.trajectory.followed import FollowedLayer, followed_layers

Sink = Callable[[Tensor, Tensor], None]


class FollowedLinear:
    """One linear layer and what is followed of it: its own weight, or a LoRA adapter.

    Args:
        layer: on `nn.Linear`, or transformers' `Conv1D`, which keeps its weight transposed.
        dtype: of the products; inputs and weights are cast to it, products are accumulated in float32. None: that of
            the weight.
    """

    def __init__(self, layer: FollowedLayer, dtype: torch.dtype | None) -> None:
        self.base, self.lora, self.names = layer.base, layer.lora, layer.names
        self.dtype: torch.dtype = dtype or layer.base.weight.dtype
        self.transposed = not isinstance(layer.base, nn.Linear)
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
    """The linear layers of `model` whose weights or LoRA adapters are followed, ready for products.

    Args:
        model: whose trainable parameters are all to be followed.
        dtype: of the products; None: that of each layer's weight.

    Raises:
        ModelError: some trainable parameter cannot be followed.
    """
    return {module: FollowedLinear(layer, dtype) for module, layer in followed_layers(model).items()}
