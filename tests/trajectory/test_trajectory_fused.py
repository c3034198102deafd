"""Compiled steps against the formulae they stand for, and which pieces of which models they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpursuit.trajectory.fused import Attention, Gate, RmsNorm, Rotate
from gradpursuit.trajectory.pieces import Pieces

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # relative errors: of sums, and of one rounding


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(fused: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], limit: float) -> None:
    """Values and gradients of `fused` against those of `plain` in float64."""
    low = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    value, expected = fused(*low), plain(*exact)
    delta = random(*expected.shape, seed=9, dtype=value.dtype)
    pairs = [(value, expected)]
    found = torch.autograd.grad(value, low, delta)
    pairs += list(zip(found, torch.autograd.grad(expected, exact, delta.double()), strict=True))
    for number, (a, b) in enumerate(pairs):
        assert a.shape == b.shape
        a, b = a.detach().double(), b.detach()
        assert float(b.norm()) > 0
        error = float((a - b).norm() / b.norm())
        assert error <= limit, (number, error)


@pytest.mark.parametrize("width", [7, 64, 576])
def test_norm(width: int) -> None:
    x, weight = random(3, 5, width) * torch.tensor([1e-3, 1.0, 100.0])[:, None, None], random(width, seed=1)
    eps = 1e-5
    assert_same(
        lambda x: RmsNorm.apply(x, weight, eps, torch.float32)[0],
        lambda x: weight.double() * x / (x.square().mean(-1, keepdim=True) + eps).sqrt(),
        [x],
        2e-6,
    )
    y, low = RmsNorm.apply(x, weight, eps, torch.bfloat16)
    assert torch.equal(low, y.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_gate(dtype: torch.dtype) -> None:
    g = torch.cat([20 * random(4, 33), torch.tensor([[-200.0, -89.0, 0.0, 89.0, 200.0] + [1.0] * 28])]).to(dtype)
    assert_same(Gate.apply, lambda g, u: F.silu(g) * u, [g, random(5, 33, seed=1, dtype=dtype)], DTYPES[dtype])


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("batch", [1, 2])
def test_rotary(dtype: torch.dtype, batch: int) -> None:
    cos, sin = random(batch, 6, 8, seed=1), random(batch, 6, 8, seed=2)  # the halves may differ

    def plain(x: Tensor) -> Tensor:
        swapped = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
        return x * cos[:, None] + swapped * sin[:, None]

    x = random(2, 6, 3, 8, dtype=dtype).transpose(1, 2)
    assert_same(lambda x: Rotate.apply(x, cos, sin, dtype), plain, [x], DTYPES[dtype])


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("length", [5, 64, 81])
def test_attention(dtype: torch.dtype, length: int) -> None:
    """Grouped heads, values as a projection leaves them, and a mask of the smallest number that there is."""
    mask = torch.full((2, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    mask[1, :, :, length - 2 :] = torch.finfo(torch.float32).min

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
        return (torch.softmax(0.3 * q @ k.transpose(2, 3) + mask, -1) @ v).transpose(1, 2)

    q, k = random(2, 6, length, 8, dtype=dtype), random(2, 2, length, 8, seed=1, dtype=dtype)
    v = random(2, length, 2, 8, seed=2, dtype=dtype).transpose(1, 2)
    limit = 2e-6 if dtype == torch.float32 else 1e-2  # scores and weights are rounded, too
    assert_same(lambda q, k, v: Attention.apply(q, k, v, mask, 0.3), plain, [q, k, v], limit)


@pytest.mark.parametrize(
    ("kind", "norms", "gates", "functions"),
    [("llama", 5, 2, 2), ("qwen2", 5, 2, 2), ("gemma3", 13, 0, 2), ("gemma2", 9, 0, 2), ("gpt2", 0, 0, 0)],
)
def test_pieces_that_are_recognised(tiny: Any, kind: str, norms: int, gates: int, functions: int) -> None:
    pieces = Pieces(tiny.lora(kind))
    assert (len(pieces._norms), len(pieces._gates), len(pieces._functions)) == (norms, gates, functions)


class CentredRMSNorm(nn.Module):
    """By its name a root-mean-square norm."""

    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (16,), self.weight, eps=self.eps)


class SumMLP(nn.Module):
    """By its parts a gated block."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(16, 16) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


def test_pieces_that_compute_something_else_are_left_alone() -> None:
    pieces = Pieces(nn.Sequential(CentredRMSNorm(), SumMLP()))
    assert not pieces._norms
    assert not pieces._gates


def test_a_broken_weight_is_left_to_the_model_itself(tiny: Any) -> None:
    model = tiny.lora("llama")
    with torch.no_grad():
        model.base_model.model.model.norm.weight.fill_(float("nan"))
    assert len(Pieces(model)._norms) == 4
