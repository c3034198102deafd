"""Pieces of a decoder layer as single steps of autograd on the CPU, in place of the many that the model makes of them.

Values are those of the model's own formulae but for the order of sums, and but for roundings to bfloat16 between the
steps, of which there are fewer.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from gradpursuit.trajectory import loops
from gradpursuit.trajectory.packed import Layout


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products of `x` are computed in: autocast's type, if it is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class RmsNorm(torch.autograd.Function):
    """weight · x / √(mean x² + eps) of x [..., d] float32, and the same in `dtype` for the products that follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The second result has no gradient: it is a copy of the first."""
        rows = x.detach().contiguous().view(-1, x.shape[-1])
        y, scale = torch.empty_like(rows), torch.empty(len(rows))
        low = y if dtype == torch.float32 else torch.empty(rows.shape, dtype=dtype)
        loops.rms_norm(
            _array(rows), _array(weight), eps, _array(y), _array(low[:, :0] if low is y else low), scale.numpy()
        )
        ctx.save_for_backward(rows, weight, scale)
        y = y.view(x.shape)
        low = y.detach() if low.dtype == torch.float32 else low.view(x.shape)
        ctx.mark_non_differentiable(low)
        return y, low

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        rows, weight, scale = ctx.saved_tensors
        dx = torch.empty_like(rows)
        delta = deltas[0].contiguous().view(rows.shape)
        loops.rms_norm_backward(_array(delta), _array(rows), _array(weight), scale.numpy(), _array(dx))
        return dx.view(deltas[0].shape), None, None, None


class Gate(torch.autograd.Function):
    """silu(g) · u."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        """Of tensors of one shape and dtype."""
        g, u = g.detach().contiguous(), u.detach().contiguous()
        y = torch.empty_like(g)
        loops.gate(_flat(g), _flat(u), _flat(y))
        ctx.save_for_backward(g, u)
        return y

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients."""
        g, u = ctx.saved_tensors
        dg, du = torch.empty_like(g), torch.empty_like(u)
        loops.gate_backward(_flat(deltas[0].contiguous()), _flat(g), _flat(u), _flat(dg), _flat(du))
        return dg, du


class Rotate(torch.autograd.Function):
    """Rotary positions of x [B, H, L, D], by cos and sin [1 or B, L, D] float32, in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """Contiguous, whatever x is: a projection's output [B, L, H, D] seen as [B, H, L, D] is not copied first."""
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        y = torch.empty(x.shape, dtype=dtype)
        loops.rotate(_array(x.detach().transpose(1, 2).contiguous()), _array(cos), _array(sin), _array(y))
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x."""
        cos, sin = ctx.saved_tensors
        delta = deltas[0].contiguous()
        B, H, L, D = delta.shape
        dx = torch.empty(B, L, H, D, dtype=ctx.dtype)
        loops.rotate_backward(_array(delta), _array(cos), _array(sin), _array(dx))
        return dx.transpose(1, 2), None, None, None


class Attention(torch.autograd.Function):
    """softmax(scaling · q kᵀ + mask) v of q [B, H, L, D], k and v [B, K, M, D], one dtype, as [B, L, H, D].

    The H / K heads that share keys are one matrix product, so that keys and values are never repeated.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
        """`mask` [1 or B, 1, L, M] is added to the scores."""
        (B, H, L, D), (_, K, M, _) = q.shape, k.shape
        q, k, v = (x.detach().reshape(B * K, -1, D) for x in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2))
        shape = (B, H, L, M)
        loops.softmax(
            _array(scores.view(shape)), _array(mask[:, 0].float().contiguous()), scaling, _array(scores.view(shape))
        )
        ctx.save_for_backward(q, k, v, scores)
        ctx.shape, ctx.scaling = (B, H, L, D), scaling
        return torch.bmm(scores, v).view(B, H, L, D).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of q, k and v."""
        q, k, v, weights = ctx.saved_tensors
        B, H, L, D = ctx.shape
        delta = deltas[0].transpose(1, 2).reshape(q.shape)
        dv = torch.bmm(weights.transpose(1, 2), delta)
        ds = torch.bmm(delta, v.transpose(1, 2))
        M = ds.shape[2]
        loops.softmax_backward(_array(ds.view(-1, M)), _array(weights.view(-1, M)), ctx.scaling, _array(ds.view(-1, M)))
        dq, dk = torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q)
        return dq.view(B, H, L, D), dk.view(B, -1, M, D), dv.view(B, -1, M, D), None, None


class PackedAttention(torch.autograd.Function):
    """:class:`Attention` over rows in one sequence, each with what it sees; q [1, H, N, D], k and v [1, K, N, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float) -> Tensor:
        """[1, N, H, D]; tokens that belong to no row get those of another one."""
        (_, H, _N, D), K = q.shape, k.shape[1]
        R, L = layout.own.shape
        q = _taken(q, layout.seen_by(H)[0]).view(R * K, -1, D)
        k, v = (_taken(x, layout.seen_by(K)[1]).view(R * K, -1, D) for x in (k, v))
        scores = torch.bmm(q, k.transpose(1, 2))
        shaped = _array(scores.view(R, H, L, -1))
        loops.softmax(shaped, _array(layout.mask), scaling, shaped)
        ctx.save_for_backward(q, k, v, scores)
        ctx.layout, ctx.scaling, ctx.shape = layout, scaling, (H, K, D)
        found = torch.bmm(scores, v).view(R, H, L, D).transpose(1, 2).reshape(R * L, H * D)
        return found.index_select(0, layout.place).view(1, -1, H, D)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of q, k and v; those of the common beginning are summed over rows in float32."""
        q, k, v, weights = ctx.saved_tensors
        layout: Layout = ctx.layout
        H, K, D = ctx.shape
        R, L = layout.own.shape
        delta = deltas[0].reshape(-1, H * D).index_select(0, layout.own.flatten()).view(R, L, H, D)
        delta = (delta * layout.real[:, :, None, None]).transpose(1, 2).reshape(q.shape)
        dv = torch.bmm(weights.transpose(1, 2), delta)
        ds = torch.bmm(delta, v.transpose(1, 2))
        flat = _array(ds.view(-1, ds.shape[2]))
        loops.softmax_backward(flat, _array(weights.view(flat.shape)), ctx.scaling, flat)
        dq, dk = torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q)

        def in_sequence(d: Tensor) -> Tensor:
            found = d.transpose(0, 1).reshape(d.shape[1], R * L, D).index_select(1, layout.place)
            found[:, layout.used :] = 0
            return found

        def joined(d: Tensor) -> Tensor:
            d = d.view(R, K, -1, D)
            own, P = in_sequence(d[:, :, layout.shared :]), layout.shared
            if P:
                own[:, :P] = d[:, :, :P].float().sum(0).add_(own[:, :P])
            return own[None]

        return in_sequence(dq.view(R, H, L, D))[None], joined(dk), joined(dv), None, None


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """Of x [1, heads, N, D] the vectors at `places` in [heads · N]: [n, D]."""
    return x.detach().reshape(-1, x.shape[-1]).index_select(0, places)


def _array(x: Tensor) -> NDArray[Any]:
    """The memory of `x`; bfloat16 as the bits."""
    x = x.detach()
    array: NDArray[Any] = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    return array


def _flat(x: Tensor) -> NDArray[Any]:
    return _array(x.view(-1))
