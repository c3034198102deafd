"""Compiled loops for the CPU over gradients: Adam's preconditioner and the sketch, in one pass through memory each.

They hold no interpreter lock: batches are computed by threads side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from gradpursuit.trajectory.loops import FAST

_F32 = np.float32


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def adam(g: Any, m: Any, v: Any, of_g: Any, of_square: Any, eps: Any, y: Any) -> None:
    """y = (m + of_g · g) / (√(v + of_square · g²) + eps), of g [B, n] and m, v [n]."""
    for b in range(len(g)):
        row, out = g[b], y[b]
        for j in range(len(row)):
            root = np.sqrt(v[j] + _F32(of_square) * row[j] * row[j]) + _F32(eps)
            out[j] = (m[j] + _F32(of_g) * row[j]) / root


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def rotation_sketch(values: Any, signs: Any, offsets: Any, out: Any) -> None:
    """Add pieces of values [B, n], times signs [R, n] and rotated by offsets [R, pieces], to out [B, d]."""
    n, d = values.shape[1], out.shape[1]
    for b in range(len(values)):
        for start in range(0, n, d):
            stop = min(start + d, n)
            for r in range(len(signs)):
                offset = offsets[r, start // d]
                wrap = min(start + d - offset, stop)
                _add_product(values[b, start:wrap], signs[r, start:wrap], out[b, offset:])
                _add_product(values[b, wrap:stop], signs[r, wrap:stop], out[b])


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def _add_product(a: Any, b: Any, out: Any) -> None:
    for j in range(len(a)):
        out[j] += a[j] * b[j]
