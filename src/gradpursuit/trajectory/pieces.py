"""Which pieces of a model may be replaced by their fused forms: those that compute the same, which is tried out.

A piece is found by what it is called and taken only if, on random numbers, its own code gives the same values
and gradients as the fused form; all others stay as they are.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from gradpursuit.trajectory.fused import Attention, Gate, PackedAttention, RmsNorm, Rotate, compute_dtype
from gradpursuit.trajectory.packed import current_layout

Remember = Callable[[Tensor, Tensor], None]
_ATTENTION = "eager_attention_forward"
_TOLERANCE = 1e-4  # relative, of float32 numbers


class Pieces:
    """The replaceable pieces of a model; there are none unless all of it is on the CPU."""

    @torch.inference_mode(False)  # gradients are compared
    @torch.enable_grad()
    def __init__(self, model: nn.Module) -> None:
        on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
        modules = list(model.modules()) if on_cpu else []
        self._norms = {m: weight for m in modules if (weight := _norm_weight(m)) is not None}
        self._gates = [m for m in modules if _is_gated(m)]
        self._functions: list[tuple[ModuleType, str, Callable[..., Any]]] = []
        for code in {sys.modules[type(m).__module__] for m in modules}:
            for name, fuse, same in (
                ("apply_rotary_pos_emb", _rotary, _same_rotary),
                (_ATTENTION, _attention, _same_attention),
            ):
                plain = getattr(code, name, None)
                if plain is not None and same(plain, fuse(plain)):
                    self._functions.append((code, name, fuse(plain)))

    @property
    def attends(self) -> bool:
        """Whether attention is one of them."""
        return any(name == _ATTENTION for _, name, _ in self._functions)

    @contextmanager
    def fused(self, remember: Remember) -> Iterator[None]:
        """Replace them inside the block; `remember` is told of a tensor and its copy in the products' dtype."""
        with ExitStack() as stack:
            fused = {
                **{norm: _fused_norm(norm, weight, remember) for norm, weight in self._norms.items()},
                **{block: _fused_gate(block) for block in self._gates},
            }
            for module, forward in fused.items():
                if "forward" not in module.__dict__:  # nobody has given this very module another one since
                    stack.enter_context(forward_replaced(module, forward))
            for code, name, function in self._functions:
                stack.enter_context(mock.patch.object(code, name, function))
            yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one module another forward method inside the block."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = before


def _eps(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


def _norm_weight(norm: nn.Module) -> Callable[[], Tensor] | None:
    """What a root-mean-square norm multiplies with: its weight, or 1 + its weight (Gemma); None: it is no such norm."""
    weight = getattr(norm, "weight", None)
    if "RMSNorm" not in type(norm).__name__ or not isinstance(weight, Tensor) or weight.dtype != torch.float32:
        return None
    if weight.requires_grad:
        return None  # the fused form has no gradient for it
    x = _random(3, weight.shape[0]) * torch.tensor([[1e-3], [1.0], [30.0]])  # the smallest row shows eps
    choices: tuple[Callable[[], Tensor], ...] = (lambda: weight.detach(), lambda: 1 + weight.detach())
    for choice in choices:
        if _same(norm.forward, lambda x, w=choice: RmsNorm.apply(x, w(), _eps(norm), x.dtype)[0], x):
            return choice
    return None


def _fused_norm(norm: nn.Module, weight: Callable[[], Tensor], remember: Remember) -> Callable[..., Tensor]:
    plain = norm.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or x.dtype != torch.float32:  # such as the gate of a norm that may have one
            return plain(x, *args, **kwargs)
        y, low = RmsNorm.apply(x, weight(), _eps(norm), compute_dtype(x))
        if low.dtype != y.dtype:
            remember(y, low)
        return y

    return forward


def _is_gated(block: Any) -> bool:
    """Whether it computes down(silu(gate(x)) · up(x)), tried with other things in the place of its projections."""
    if not all(isinstance(getattr(block, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    tried = SimpleNamespace(
        gate_proj=lambda x: 2 * x[..., :5], up_proj=lambda x: x[..., 5:] + 1, down_proj=lambda x: x.cumsum(-1),
        act_fn=getattr(block, "act_fn", None),
    )  # fmt: skip
    return _same(partial(type(block).forward, tried), _fused_gate(tried), _random(2, 3, 10))


def _fused_gate(block: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return block.down_proj(Gate.apply(block.gate_proj(x), block.up_proj(x)))

    return forward


def _rotary(plain: Callable[..., Any]) -> Callable[..., Any]:
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or q.device.type != "cpu" or cos.dim() != 3 or cos.shape[-1] != q.shape[-1]:
            return plain(q, k, cos, sin, *args, **kwargs)
        return tuple(Rotate.apply(x, cos, sin, compute_dtype(x)) for x in (q, k))

    return rotary


def _attention(plain: Callable[..., Any]) -> Callable[..., Any]:
    usual = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "kwargs"}
    special = set(inspect.signature(plain).parameters) - usual

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        fits = (
            query.device.type == "cpu"
            and attention_mask is not None
            and attention_mask.dim() == 4
            and attention_mask.shape[1:] == (1, query.shape[2], key.shape[2])
            and value.shape == key.shape
            and query.shape[3] == key.shape[3]
            and kwargs.get("scaling") is not None
            and not kwargs.get("dropout")
            and all(kwargs.get(name) is None for name in special)
        )
        if not fits:
            return plain(module, query, key, value, attention_mask, **kwargs)
        dtype = compute_dtype(query)
        q, k, v = (x.to(dtype) for x in (query, key, value))
        if len(q) == 1 and q.shape[2] == k.shape[2] and (layout := current_layout(q.shape[2])):
            return PackedAttention.apply(q, k, v, layout, kwargs["scaling"]), None
        return Attention.apply(q, k, v, attention_mask, kwargs["scaling"]), None

    return attention


def _same_rotary(plain: Callable[..., Any], fused: Callable[..., Any]) -> bool:
    half = _random(2, 1, 5, 4)
    cos, sin = torch.cat([half, half], -1)

    def run(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda q, k: torch.cat(function(q, k, cos, sin), dim=1)

    return _same(run(plain), run(fused), _random(2, 4, 5, 8), _random(2, 2, 5, 8))


def _same_attention(plain: Callable[..., Any], fused: Callable[..., Any]) -> bool:
    module = SimpleNamespace(num_key_value_groups=2, training=False)
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 5, 5)

    def run(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda q, k, v: function(module, q, k, v, mask, scaling=0.3, dropout=0.0)[0]

    return _same(run(plain), run(fused), _random(2, 4, 5, 8), _random(2, 2, 5, 8), _random(2, 2, 5, 8))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _same(plain: Callable[..., Tensor], fused: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """Whether two functions of the same inputs agree in value and gradient."""
    found = []
    for function in (plain, fused):
        leaves = [x.clone().requires_grad_() for x in inputs]
        try:
            value = function(*leaves)
            gradients = torch.autograd.grad(value, leaves, _random(*value.shape))
        except (AttributeError, TypeError, RuntimeError, ValueError, IndexError):
            return False  # it wants something else than such a piece does
        found.append([value.detach(), *gradients])
    return all(
        a.shape == b.shape and a.dtype == b.dtype and float((a - b).norm()) <= _TOLERANCE * float(a.norm())
        for a, b in zip(*found, strict=True)
    )
