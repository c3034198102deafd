"""Compiled loops over rows as they are stored: int8, float16, bfloat16, float32 or float64, never copied.

A row is widened in registers, four rows at a time, so that a pass costs little more than reading its bytes; NumPy
alone widens float16 at a tenth of that speed. The loops hold no interpreter lock: threads run them side by side.
They are compiled in every process at first use (one to two seconds a type): a cache of machine code on disk would be
one more file that can be damaged, foreign or unwritable.
Two-byte floats arrive as the integers that hold their bits, int16 for float16 and uint16 for bfloat16, because Numba
has no arithmetic for either.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Sums may be regrouped (that is what makes them fast), but NaN and infinity keep their meaning.
_SUMS = {"reassoc", "contract", "nsz"}
_SPAN = 4096  # elements of a sum that are worked on at a time
_CHUNK = 1024  # elements summed in the precision of r before float64 takes over
_WIDE = {types.int8: types.float32, types.int16: types.float32, types.uint16: types.float32}


def _widen_stored(_: Any, value: Any) -> Any:
    """A stored element as float32, or float64 if it is one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (element,) = arguments
        if value == types.int8:
            return builder.sitofp(element, ir.FloatType())
        if value == types.int16:
            return builder.fpext(builder.bitcast(element, ir.HalfType()), ir.FloatType())
        if value == types.uint16:
            word = builder.zext(element, ir.IntType(32))
            return builder.bitcast(builder.shl(word, ir.Constant(ir.IntType(32), 16)), ir.FloatType())
        return element

    return _WIDE.get(value, value)(value), generate


_widen: Any = intrinsic(_widen_stored)  # as kernels call it, with the element alone


@njit(nogil=True, fastmath=_SUMS)
def dots(rows: Any, ids: Any, R: Any, out: Any) -> None:
    """Inner products of rows `ids` [n] with each of R [q, d] (of their widened type): into out [n, q] float64."""
    n, width = len(ids), rows.shape[1]
    zero = R.dtype.type(0)
    for i in range(0, n, 4):
        i_b, i_c, i_d = min(i + 1, n - 1), min(i + 2, n - 1), min(i + 3, n - 1)  # the last four may overlap
        for k in range(len(R)):
            sum_a, sum_b, sum_c, sum_d = 0.0, 0.0, 0.0, 0.0
            for start in range(0, width, _CHUNK):
                stop = min(start + _CHUNK, width)
                r, a, b = R[k, start:stop], rows[ids[i], start:stop], rows[ids[i_b], start:stop]
                c, d = rows[ids[i_c], start:stop], rows[ids[i_d], start:stop]
                part_a, part_b, part_c, part_d = zero, zero, zero, zero
                for j in range(len(r)):
                    part_a += _widen(a[j]) * r[j]
                    part_b += _widen(b[j]) * r[j]
                    part_c += _widen(c[j]) * r[j]
                    part_d += _widen(d[j]) * r[j]
                sum_a, sum_b, sum_c, sum_d = sum_a + part_a, sum_b + part_b, sum_c + part_c, sum_d + part_d
            out[i_d, k], out[i_c, k], out[i_b, k], out[i, k] = sum_d, sum_c, sum_b, sum_a


@njit(nogil=True, fastmath=_SUMS)
def squares(rows: Any, ids: Any, out: Any) -> None:
    """Squared Euclidean norms of rows `ids` [n], summed in float64: into out [n] float64."""
    for i in range(len(ids)):
        total, row = 0.0, rows[ids[i]]
        for j in range(len(row)):
            value = np.float64(_widen(row[j]))
            total += value * value
        out[i] = total


@njit(nogil=True)
def gather(rows: Any, ids: Any, scale: Any, where: Any, out: Any) -> None:
    """Rows `ids` [m] times their scale [m] float64: into the rows `where` [m] of out [·, d]."""
    for k in range(len(ids)):
        row, copy, factor = rows[ids[k]], out[where[k]], out.dtype.type(scale[k])
        for j in range(len(row)):
            copy[j] = _widen(row[j]) * factor


@njit(nogil=True, fastmath={"contract"})
def accumulate(rows: Any, ids: Any, weights: Any, total: Any) -> None:
    """Add the sum of rows `ids` [m] times weights [m] float64 to total [d] float64."""
    m, width = len(ids), len(total)
    for start in range(0, width, _SPAN):  # so that the sums stay in the nearest cache
        stop = min(start + _SPAN, width)
        part = total[start:stop]
        for k in range(0, m - m % 4, 4):
            a, b = rows[ids[k], start:stop], rows[ids[k + 1], start:stop]
            c, d = rows[ids[k + 2], start:stop], rows[ids[k + 3], start:stop]
            w_a, w_b, w_c, w_d = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
            for j in range(len(part)):
                part[j] += (w_a * _widen(a[j]) + w_b * _widen(b[j])) + (w_c * _widen(c[j]) + w_d * _widen(d[j]))
        for k in range(m - m % 4, m):
            row, weight = rows[ids[k], start:stop], weights[k]
            for j in range(len(part)):
                part[j] += weight * _widen(row[j])
