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
        """The gradient of x: turned back, which is turned by the other half's sine, negated."""
        cos, sin = ctx.saved_tensors
        delta = deltas[0].contiguous()
        B, H, L, D = delta.shape
        dx = torch.empty(B, L, H, D, dtype=ctx.dtype)
        other = -sin.roll(D // 2, dims=-1)
        loops.rotate_back(_array(delta), _array(cos), _array(other), _array(dx))
        return dx.transpose(1, 2), None, None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """softmax(scaling · q kᵀ + mask) v of q [B, H, L, D], k and v [B, K, M, D], as [B, H, L, D]; weights [B, H, L, M].

    `mask` [1 or B, L, M] float32 is added. The H / K heads that share keys are one matrix product, so that keys and
    values are never repeated.
    """
    (B, H, L, D), (_, K, M, _) = q.shape, k.shape
    q, k, v = (x.reshape(B * K, -1, D) for x in (q, k, v))
    weights = torch.bmm(q, k.transpose(1, 2)).view(B, H, L, M)
    loops.softmax(_array(weights), _array(mask), scaling, _array(weights))
    return torch.bmm(weights.view(B * K, -1, M), v).view(B, H, L, D), weights


def _attend_backward(
    delta: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `_attend`: the gradients of q, k and v, for `delta` [B, H, L, D]."""
    (B, H, L, D), (_, K, M, _) = q.shape, k.shape
    q, k, v, delta = (x.reshape(B * K, -1, D) for x in (q, k, v, delta))
    p = weights.view(B * K, -1, M)
    dv, ds = torch.bmm(p.transpose(1, 2), delta), torch.bmm(delta, v.transpose(1, 2))
    flat = _array(ds.view(-1, M))
    loops.softmax_backward(flat, _array(weights.view(-1, M)), scaling, flat)
    dq, dk = torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q)
    return dq.view(B, H, L, D), dk.view(B, K, M, D), dv.view(B, K, M, D)


class Attention(torch.autograd.Function):
    """softmax(scaling · q kᵀ + mask) v of q [B, H, L, D], k and v [B, K, M, D], one dtype, as [B, L, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
        """`mask` [1 or B, 1, L, M] is added to the scores."""
        q, k, v = (x.detach() for x in (q, k, v))
        found, weights = _attend(q, k, v, mask[:, 0].float().contiguous(), scaling)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scaling = scaling
        return found.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of q, k and v."""
        q, k, v, weights = ctx.saved_tensors
        return *_attend_backward(deltas[0].transpose(1, 2), q, k, v, weights, ctx.scaling), None, None


class PackedAttention(torch.autograd.Function):
    """:class:`Attention` over rows in one sequence, each with what it sees; q [1, H, N, D], k and v [1, K, N, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scaling: float) -> Tensor:
        """[1, N, H, D]; tokens that belong to no row get those of another one."""
        (_, H, N, D), K, P = q.shape, k.shape[1], layout.shared
        R, L = layout.own.shape
        first = [x.detach()[:, :, :P].contiguous() for x in (q, k, v)]
        q = _taken(q, layout.seen_by(H)[0]).view(R, H, L, D)
        k, v = (_taken(x, layout.seen_by(K)[1]).view(R, K, P + L, D) for x in (k, v))
        found, weights = _attend(q, k, v, layout.mask, scaling)
        out = q.new_empty(1, N, H, D)
        rows = found.transpose(1, 2).reshape(R * L, H * D)
        torch.index_select(rows, 0, layout.place, out=out.view(N, H * D)[P:])
        before = q.new_empty(0)
        if P:
            head, before = _attend(first[0], first[1], first[2], layout.before, scaling)
            out[:, :P] = head.transpose(1, 2)
        ctx.save_for_backward(q, k, v, weights, *first, before)
        ctx.layout, ctx.scaling = layout, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of q, k and v; those of the common beginning are summed over rows in float32."""
        q, k, v, weights, q0, k0, v0, before = ctx.saved_tensors
        layout: Layout = ctx.layout
        R, H, L, D = q.shape
        P, delta = layout.shared, deltas[0]
        rows = delta.reshape(-1, H * D).index_select(0, layout.own.flatten()).view(R, L, H, D)
        rows = (rows * layout.real[:, :, None, None]).transpose(1, 2)
        dq, dk, dv = _attend_backward(rows, q, k, v, weights, ctx.scaling)
        found = [_in_sequence(dq, layout), *(_in_sequence(d[:, :, P:], layout) for d in (dk, dv))]
        if P:
            head = delta[:, :P].transpose(1, 2)
            own = _attend_backward(head, q0, k0, v0, before, ctx.scaling)
            found[0][:, :, :P] = own[0]
            for all_of, mine, seen in zip(found[1:], own[1:], (dk, dv), strict=True):
                all_of[:, :, :P] = seen[:, :, :P].float().sum(0, keepdim=True).add_(mine)
        return *found, None, None


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """Of x [1, heads, N, D] the vectors at `places` in [heads · N]: [n, D]."""
    return x.detach().reshape(-1, x.shape[-1]).index_select(0, places)


def _in_sequence(d: Tensor, layout: Layout) -> Tensor:
    """d [R, heads, L, D] of the rows' own tokens as [1, heads, N, D]; what is no row's is zero."""
    R, heads, L, D = d.shape
    found = d.new_zeros(1, heads, layout.size, D)
    used = layout.place[: layout.used - layout.shared]
    found[0, :, layout.shared : layout.used] = d.transpose(0, 1).reshape(heads, R * L, D).index_select(1, used)
    return found


def _array(x: Tensor) -> NDArray[Any]:
    """The memory of `x`; bfloat16 as the bits."""
    x = x.detach()
    array: NDArray[Any] = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    return array


def _flat(x: Tensor) -> NDArray[Any]:
    return _array(x.view(-1))
