"""Compiled loops for the CPU: what a decoder layer and its gradients do element by element, in one pass each.

Torch goes through memory once for every multiplication, cast and sum; these loops read their inputs once and write
their results once. They compute in float32 whatever the type of an array: float32, or bfloat16 as the uint16 that
hold its bits, because Numba has no arithmetic for it; what is written is rounded once, to nearest even.
The loops hold no interpreter lock: batches are computed by threads side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Sums may be regrouped (that is what makes them fast), but NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}
_F32 = np.float32


def _load(_: Any, value: Any) -> Any:
    """A stored element as float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value != types.uint16:
            return arguments[0]
        word = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(value), generate


def _as_float(_: Any, value: Any) -> Any:
    """The float32 that 32 bits stand for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


load: Any = intrinsic(_load)
_float: Any = intrinsic(_as_float)


def _rounded(_: Any, like: Any, value: Any) -> Any:
    """A float32 in the type of `like`: itself, or the bits of the nearest bfloat16 (ties to even; NaN stays NaN)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = arguments[1]
        if like != types.uint16:
            return number
        i32, i16 = ir.IntType(32), ir.IntType(16)
        word = builder.bitcast(number, i32)
        odd = builder.and_(builder.lshr(word, ir.Constant(i32, 16)), ir.Constant(i32, 1))
        up = builder.add(word, builder.add(odd, ir.Constant(i32, 0x7FFF)))
        kept = builder.trunc(builder.lshr(up, ir.Constant(i32, 16)), i16)
        return builder.select(builder.fcmp_unordered("uno", number, number), ir.Constant(i16, 0x7FC0), kept)

    return like(like, types.float32), generate


rounded: Any = intrinsic(_rounded)


@njit(nogil=True, error_model="numpy", fastmath=FAST, inline="always")
def _exp(x: Any) -> Any:
    """e^x of a float32 below 88, to two units in the last place: 2^n times a polynomial (Cephes' expf).

    Below -87 it is 0: what lies there are subnormal numbers, with which processors are a hundred times slower.
    """
    if x < _F32(-87.0):
        return _F32(0)
    n = np.floor(x * _F32(1.44269504) + _F32(0.5))
    r = x - n * _F32(0.693359375) + n * _F32(2.12194440e-4)
    p = _F32(1.9875691500e-4)
    p = p * r + _F32(1.3981999507e-3)
    p = p * r + _F32(8.3334519073e-3)
    p = p * r + _F32(4.1665795894e-2)
    p = p * r + _F32(1.6666665459e-1)
    p = p * r + _F32(5.0000001201e-1)
    p = p * r * r + r + _F32(1.0)
    return p * _float((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def rms_norm(x: Any, weight: Any, eps: Any, y: Any, half: Any, scale: Any) -> None:
    """y = weight · x / √(mean x² + eps) by row of x [n, d]; `half` [n, d] or [n, 0] gets y too, `scale` [n] the 1/√."""
    width = x.shape[1]
    for i in range(len(x)):
        row, total = x[i], _F32(0)
        for j in range(width):
            total += row[j] * row[j]
        s = _F32(1) / np.sqrt(total / _F32(width) + _F32(eps))
        scale[i] = s
        out, low = y[i], half[i]
        for j in range(width):
            out[j] = row[j] * s * weight[j]
        for j in range(len(low)):
            low[j] = rounded(low[j], out[j])


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def rms_norm_backward(dy: Any, x: Any, weight: Any, scale: Any, dx: Any) -> None:
    """Of `rms_norm`: the gradient of x [n, d]."""
    width = x.shape[1]
    for i in range(len(x)):
        row, delta, out, total = x[i], dy[i], dx[i], _F32(0)
        for j in range(width):
            total += delta[j] * weight[j] * row[j]
        s = scale[i]
        shift = total * s * s * s / _F32(width)
        for j in range(width):
            out[j] = delta[j] * weight[j] * s - row[j] * shift


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def gate(g: Any, u: Any, y: Any) -> None:
    """y = silu(g) · u, flat."""
    for j in range(len(y)):
        a = load(g[j])
        y[j] = rounded(y[j], a / (_F32(1) + _exp(min(-a, _F32(87)))) * load(u[j]))


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def gate_backward(dy: Any, g: Any, u: Any, dg: Any, du: Any) -> None:
    """Of `gate`: the gradients of g and u."""
    for j in range(len(dy)):
        d, a = load(dy[j]), load(g[j])
        s = _F32(1) / (_F32(1) + _exp(min(-a, _F32(87))))
        du[j] = rounded(du[j], d * a * s)
        dg[j] = rounded(dg[j], d * load(u[j]) * s * (_F32(1) + a * (_F32(1) - s)))


@njit(nogil=True, error_model="numpy", fastmath=FAST, inline="always")
def _turn(x: Any, c: Any, s: Any, y: Any) -> None:
    """One vector [D]: y = x · c + (-x₂, x₁) · s of its halves."""
    half = len(x) // 2
    for j in range(half):
        p, q = load(x[j]), load(x[j + half])
        y[j] = rounded(y[j], p * c[j] - q * s[j])
        y[j + half] = rounded(y[j + half], q * c[j + half] + p * s[j + half])


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def rotate(x: Any, cos: Any, sin: Any, y: Any) -> None:
    """Rotary positions by cos and sin [1 or B, L, D]: of x [B, L, H, D], as y [B, H, L, D]."""
    for b in range(len(x)):
        at = b if len(cos) > 1 else 0
        for i in range(x.shape[1]):
            for h in range(x.shape[2]):
                _turn(x[b, i, h], cos[at, i], sin[at, i], y[b, h, i])


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def rotate_back(x: Any, cos: Any, sin: Any, y: Any) -> None:
    """The same of x [B, H, L, D], as y [B, L, H, D]."""
    for b in range(len(x)):
        at = b if len(cos) > 1 else 0
        for i in range(x.shape[2]):
            for h in range(x.shape[1]):
                _turn(x[b, h, i], cos[at, i], sin[at, i], y[b, i, h])


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def softmax(scores: Any, mask: Any, factor: Any, y: Any) -> None:
    """Of factor · scores [B, H, L, M] + mask [1 or B, L, M], along M."""
    B, H, L, M = scores.shape
    wide = -(-M // 32) * 32  # so that no part of the loop over exponentials is left to do one by one
    line = np.full(wide, -np.inf, np.float32)
    for b in range(B):
        at = b if len(mask) > 1 else 0
        for h in range(H):
            for i in range(L):
                row, shift, out = scores[b, h, i], mask[at, i], y[b, h, i]
                top = _F32(-np.inf)
                for j in range(M):
                    line[j] = load(row[j]) * _F32(factor) + shift[j]
                    top = max(top, line[j])
                line[M:] = top
                for j in range(wide):
                    line[j] = _exp(line[j] - top)
                total = _F32(0)
                for j in range(M):
                    total += line[j]
                part = _F32(1) / total
                for j in range(M):
                    out[j] = rounded(out[j], line[j] * part)


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def softmax_backward(dy: Any, y: Any, factor: Any, dx: Any) -> None:
    """Of `softmax`: the gradient of the scores; all [n, M]; dx may be dy."""
    n, M = y.shape
    for i in range(n):
        p, delta, out, total = y[i], dy[i], dx[i], _F32(0)
        for j in range(M):
            total += load(p[j]) * load(delta[j])
        for j in range(M):
            out[j] = rounded(out[j], load(p[j]) * (load(delta[j]) - total) * _F32(factor))
