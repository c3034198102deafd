"""How features are held on disk: float32, float16, bfloat16 or int8.

| dtype    | stored [n, d]      | `scale` [n] float32             | error of an element x of a row of largest |x| = a |
|----------|--------------------|---------------------------------|---------------------------------------------------|
| float32  | x                  | none                            | 0                                                 |
| bfloat16 | x, nearest         | none                            | at most 2⁻⁸·|x|                                   |
| float16  | x / scale, nearest | a power of two: a / scale is in | at most 2⁻¹¹·|x| + 2⁻³⁹·a                         |
|          |                    | [2¹⁴, 2¹⁵)                      |                                                   |
| int8     | x / scale, nearest | a / 127                         | at most a / 254 (and 2⁻²³·a of rounding)          |

A row of features is stored × its scale. Gradients are often 1e-5 or smaller, where float16 alone has lost most of its
digits, and a few are above 65,504, where it has none: a scale of its own for each row mends both and, being a power
of two, rounds nothing. int8 is symmetric: -127 … 127. The bounds hold for normal float32 numbers, above 1.2e-38; int8
has no scale for a row whose a is below 1.5e-36, nor bfloat16 a finite value above 3.39e38: a store refuses such rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}
SCALED = ("float16", "int8")
_SMALLEST = -126  # exponent of the smallest float32 with all its digits: scales stay above it
_ROWS = 256  # rows encoded at a time, so that temporary arrays stay small


@dataclass(frozen=True)
class Block:
    """Rows as they are stored; `np.asarray` decodes them.

    Attributes:
        values: [n, d] in a type of :data:`DTYPES`, usually memory-mapped.
        scale: float32 [n], the factor of each row; None for factors of 1.
    """

    values: NDArray[Any]
    scale: NDArray[np.float32] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return self.values.shape[0], self.values.shape[1]

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """Decoded: float32, or float64 if that is asked for."""
        wide: NDArray[Any] = self.values.astype(np.float64 if dtype == np.float64 else np.float32)
        if self.scale is not None:
            np.multiply(wide, self.scale[:, None], out=wide)
        return wide if dtype is None else wide.astype(dtype, copy=False)


def encode(features: NDArray[np.float32], dtype: str) -> Block:
    """Rows [n, d] of finite float32 as they are stored in `dtype`.

    A row that does not fit (its bfloat16 overflows, its int8 scale would underflow) comes out not finite or all zero:
    the caller looks at it with :func:`misfits`.
    """
    values, scale = np.empty(features.shape, DTYPES[dtype]), np.ones(len(features), np.float32)
    for start in range(0, len(features), _ROWS):
        rows = slice(start, start + _ROWS)
        part, scale[rows] = _scaled(features[rows], dtype)
        with np.errstate(over="ignore"):
            values[rows] = part
    return Block(values, scale if dtype in SCALED else None)


def _scaled(rows: NDArray[np.float32], dtype: str) -> tuple[NDArray[Any], NDArray[Any] | float]:
    """Rows [n, d] divided by their scale, to be rounded to `dtype`, and the scale [n] or 1."""
    if dtype not in SCALED:
        return rows, 1.0
    largest = np.abs(rows).max(axis=1, initial=0)
    if dtype == "float16":
        exponent = np.maximum(np.frexp(largest)[1] - 15, _SMALLEST)
        return np.ldexp(rows, -exponent[:, None]), np.ldexp(np.float32(1), exponent)
    scale = largest / np.float32(127)
    usable = scale >= 2.0**_SMALLEST
    return np.rint(rows / np.where(usable, scale, np.inf)[:, None].astype(np.float32)), scale


def misfits(block: Block) -> NDArray[np.bool_]:
    """Which rows [n] are no longer finite, or hold nothing but zeros."""
    bad = np.empty(len(block), np.bool_)
    for start in range(0, len(block), _ROWS):
        values = block.values[start : start + _ROWS]
        zero = ~(values != 0).any(axis=1)
        bad[start : start + _ROWS] = zero if values.dtype == np.int8 else zero | ~np.isfinite(values).all(axis=1)
    return bad
