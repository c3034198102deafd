"""The matrix of a pursuit: A in R^{D x N}, one column (atom) for each pool example.

A solver asks a matrix for five things only (:class:`GradientMatrix`), so the same solver runs on an array in
memory, on memory-mapped shards larger than memory, and on rows that live on other machines.

Both classes here read the data in the precision it is stored in and hand back float64 for everything that is
accumulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import issparse

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit.rows import Float64Array, FloatArray, IntArray, Rows

_PIECE_BYTES = 64 * 2**20


@runtime_checkable
class GradientMatrix(Protocol):
    """What a pursuit needs of A in R^{D x N}; `ids` are column numbers in 0..N-1, without repeats."""

    @property
    def shape(self) -> tuple[int, int]:
        """(D, N): length of an atom, number of atoms."""

    @property
    def nbytes(self) -> int:
        """Bytes that one pass reads."""

    def correlate(self, r: FloatArray) -> Float64Array:
        """A^T r for r [D]: float64 [N], or for r [D, q]: [N, q]; one sequential pass over the data."""

    def columns(self, ids: IntArray) -> FloatArray:
        """The atoms `ids` [m] as an array [D, m], float32 or float64."""

    def combine(self, ids: IntArray, x: FloatArray) -> Float64Array:
        """The weighted sum of the atoms `ids` [m] with weights x [m]: float64 [D]."""

    def squared_norms(self) -> Float64Array:
        """Squared Euclidean norm of every atom: float64 [N]. Computed once."""


class DenseMatrix:
    """A matrix in memory.

    Args:
        X: array-like or torch tensor [D, N]. float32 and float64 are used as they are, without a copy, also when X is
            the transposed view of row-contiguous features [N, D] (the fast layout); half precision becomes float32
            and integers float64.

    Raises:
        PursuitError: X is not a finite, non-empty matrix of real numbers.
    """

    def __init__(self, X: ArrayLike) -> None:
        self._X = _as_floats(X)
        if self._X.ndim == 2 and self._X.shape[1] == 0:
            raise PursuitError(
                f"the gradient matrix has 0 feature(s) (shape={self._X.shape}) while a minimum of 1 is required: one "
                "column for each example of the pool."
            )
        if self._X.ndim != 2 or 0 in self._X.shape:
            raise PursuitError(
                f"the gradient matrix has shape {self._X.shape}; a pursuit needs a matrix [D, N] with at least one row "
                "and one column. Reshape your data: pass the features of the pool as columns, for example `features.T`."
            )
        self._squared_norms = require_finite(self._compute_squared_norms())

    @property
    def shape(self) -> tuple[int, int]:
        """(D, N)."""
        return self._X.shape[0], self._X.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that one pass reads."""
        return self._X.nbytes

    def correlate(self, r: FloatArray) -> Float64Array:
        """A^T r for r [D]: float64 [N]; or for r [D, q]: [N, q], still one pass."""
        return (self._X.T @ np.asarray(r, dtype=self._X.dtype)).astype(np.float64, copy=False)

    def columns(self, ids: IntArray) -> FloatArray:
        """The atoms `ids` [m] as an array [D, m] in the precision of the data."""
        return self._X.T[as_ids(ids, self.shape[1])].T

    def combine(self, ids: IntArray, x: FloatArray) -> Float64Array:
        """Weighted sum of atoms, float64 [D]."""
        ids, x = as_ids(ids, self.shape[1]), np.asarray(x, dtype=np.float64)
        total = np.zeros(self.shape[0])
        for piece in _pieces(len(ids), 8 * self.shape[0]):
            total += x[piece] @ self._X.T[ids[piece]].astype(np.float64, copy=False)
        return total

    def squared_norms(self) -> Float64Array:
        """Squared Euclidean norm of every atom: float64 [N]."""
        return self._squared_norms

    def _compute_squared_norms(self) -> Float64Array:
        D, N = self.shape
        norms = np.zeros(N)
        if abs(self._X.strides[0]) <= abs(self._X.strides[1]):
            for piece in _pieces(N, 8 * D):
                norms[piece] = _row_squares(self._X[:, piece].T)
        else:
            for piece in _pieces(D, 8 * N):
                norms += _row_squares(self._X[piece].T)
        return norms


class TrajectoryMatrix:
    """Features of several checkpoints, stacked without a copy: A = [(scale_t * U_t)^T]_t, D = sum of d_t.

    Every pass reads the shards once, in order, where they lie: nothing is widened in memory. It uses all processors at
    hand (or NUMBA_NUM_THREADS) and is compiled at first use.

    Args:
        blocks: for each checkpoint t the shards of its features U_t, arrays [n_s, d_t] (int8, float16, bfloat16 of
            `ml_dtypes`, float32 or float64; `np.memmap` stays on disk) which together hold the same N rows, in the
            same order, at every t.
        scale: float64 [T, N]; row i of checkpoint t is multiplied by `scale[t, i]`. The scales that int8 rows are
            stored with, square roots of learning rates, unit rows and the balance of checkpoints are applied here.
            None: ones.

    Raises:
        PursuitError: shapes do not fit together; values that are not finite are found by the first pass,
            :meth:`squared_norms`.
    """

    def __init__(self, blocks: Sequence[Sequence[NDArray[Any]]], scale: ArrayLike | None = None) -> None:
        if isinstance(blocks, np.ndarray) or any(isinstance(shards, np.ndarray) for shards in blocks):
            raise PursuitError(
                "a trajectory is a list of shards for each checkpoint ([[U]] for one array U [N, d]), not an array."
            )
        if not blocks or not all(blocks):
            raise PursuitError("a trajectory needs at least one checkpoint, and each checkpoint at least one shard.")
        self._rows = [Rows(shards, f"checkpoint {t}") for t, shards in enumerate(blocks)]
        self._offsets, N = _stacked_layout(self._rows)
        self._shape = (int(self._offsets[-1]), N)
        self._scale = np.ones((len(self._rows), N)) if scale is None else _as_scale(scale, len(self._rows), N)
        self._dtype = max(rows.dtype for rows in self._rows)
        self._squared_norms: Float64Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(D, N)."""
        return self._shape

    @property
    def nbytes(self) -> int:
        """Bytes that one pass reads."""
        return sum(rows.nbytes for rows in self._rows)

    def correlate(self, r: FloatArray) -> Float64Array:
        """A^T r for r [D]: float64 [N], one sequential pass; or for r [D, q]: [N, q], still one pass.

        Within 1e-6·‖atom‖·‖r‖ of the exact product (1e-15 where all data is float64).
        """
        R = np.asarray(r, dtype=np.float64).reshape(len(r), -1).T
        c = np.zeros((self.shape[1], len(R)))
        for t, rows in enumerate(self._rows):
            c += self._scale[t, :, None] * rows.dots(R[:, self._offsets[t] : self._offsets[t + 1]])
        return c[:, 0] if np.ndim(r) == 1 else c

    def columns(self, ids: IntArray) -> FloatArray:
        """The atoms `ids` [m] as an array [D, m] (the transposed view of contiguous rows [m, D])."""
        ids = as_ids(ids, self.shape[1])
        atoms = np.empty((len(ids), self.shape[0]), dtype=self._dtype)
        for t, rows in enumerate(self._rows):
            rows.gather(ids, self._scale[t, ids], atoms[:, self._offsets[t] : self._offsets[t + 1]])
        return atoms.T

    def combine(self, ids: IntArray, x: FloatArray) -> Float64Array:
        """Weighted sum of atoms, float64 [D]."""
        ids, x = as_ids(ids, self.shape[1]), np.asarray(x, dtype=np.float64)
        return np.concatenate([rows.combine(ids, x * self._scale[t, ids]) for t, rows in enumerate(self._rows)])

    def squared_norms(self) -> Float64Array:
        """Squared Euclidean norm of every atom: float64 [N]; the first call is one pass over the data."""
        if self._squared_norms is None:
            norms = sum(self._scale[t] ** 2 * rows.squares() for t, rows in enumerate(self._rows))
            self._squared_norms = require_finite(np.asarray(norms))
        return self._squared_norms


def as_matrix(X: Any) -> GradientMatrix:
    """X itself if it is a :class:`GradientMatrix`, else a matrix of the array or tensor [D, N], where it lies.

    Raises :class:`PursuitError` for anything that is not a finite, non-empty matrix.
    """
    if isinstance(X, GradientMatrix):
        return X
    if getattr(getattr(X, "device", None), "type", "cpu") != "cpu":  # a torch tensor, without importing torch
        from gradpursuit.pursuit.tensor import TensorMatrix

        return TensorMatrix(X)
    return DenseMatrix(X)


def as_vector(values: Any, length: int, name: str) -> Float64Array:
    """`values` as a finite float64 vector [length], or as several [length, q]; `name` is what the error calls it."""
    vector = _as_floats(values).astype(np.float64, copy=False)
    if vector.ndim not in (1, 2) or vector.shape[0] != length or 0 in vector.shape:
        raise PursuitError(
            f"{name} has shape {vector.shape}, but the gradient matrix needs ({length},): one entry for each of its "
            "rows. Use the same checkpoints and the same projection for pool and target."
        )
    bad = np.argwhere(~np.isfinite(vector))
    if len(bad):
        where = ", ".join(map(str, bad[0]))
        raise PursuitError(
            f"{name} has {len(bad)} entries that are not finite, the first {vector[tuple(bad[0])]} at index {where}. "
            "Drop the examples whose gradient overflowed, or compute gradients in a wider precision."
        )
    return vector


def _as_floats(values: Any) -> FloatArray:
    if hasattr(values, "detach") and hasattr(values, "cpu"):  # a torch tensor, without importing torch
        values = values.detach().cpu()
        # NumPy has no bfloat16
        values = (values.float() if values.dtype.itemsize < 4 else values).numpy()
    if issparse(values):
        raise PursuitError(
            "the data is a sparse matrix; gradients are dense, and a pursuit reads them so. Pass a dense array, for "
            "example `X.toarray()`."
        )
    array = np.asarray(values)
    if array.dtype.name == "bfloat16":  # of ml_dtypes
        return array.astype(np.float32)
    if array.dtype.kind == "c":
        raise PursuitError(
            f"Complex data not supported: values of type {array.dtype} are not real numbers. Pass real and imaginary "
            "parts as rows of their own."
        )
    if array.dtype.kind not in "fiub":
        raise PursuitError(
            f"values of type {array.dtype} are not real numbers. Pass a NumPy array or torch tensor of floats."
        )
    if array.dtype in (np.float32, np.float64):
        return array
    return array.astype(np.float32 if array.dtype == np.float16 else np.float64)


def _as_scale(scale: ArrayLike, T: int, N: int) -> Float64Array:
    array = np.asarray(scale, dtype=np.float64)
    if array.shape != (T, N):
        raise PursuitError(
            f"scale has shape {array.shape}, but {T} checkpoints of {N} rows need ({T}, {N}): one factor for each row "
            "of each checkpoint."
        )
    if not np.isfinite(array).all():
        t, i = np.argwhere(~np.isfinite(array))[0]
        raise PursuitError(
            f"scale[{t}, {i}] is {array[t, i]}: a factor must be finite. A row of norm zero cannot be made a unit row; "
            "drop it."
        )
    return array


def _stacked_layout(checkpoints: list[Rows]) -> tuple[IntArray, int]:
    """Where each checkpoint starts among the D rows of A [T + 1], and N."""
    offsets = np.cumsum([0, *(rows.width for rows in checkpoints)])
    counts = [len(rows) for rows in checkpoints]
    if len(set(counts)) != 1:
        raise PursuitError(
            f"the checkpoints hold {counts} rows; every checkpoint must hold the same pool in the same order. Complete "
            "the unfinished checkpoint first."
        )
    if counts[0] == 0 or offsets[-1] == 0:
        raise PursuitError(f"the stacked features have shape [{counts[0]}, {offsets[-1]}]; there is nothing to select.")
    return offsets, counts[0]


def as_ids(ids: IntArray, N: int) -> IntArray:
    """`ids` as int64; raises :class:`PursuitError` if one is not in 0..N-1."""
    array = np.asarray(ids, dtype=np.int64)
    if array.size and (array.min() < 0 or array.max() >= N):
        raise PursuitError(f"column ids run from {array.min()} to {array.max()}; this matrix has 0..{N - 1}.")
    return array


def _pieces(count: int, item_bytes: int) -> Iterator[slice]:
    """Consecutive slices of 0..count-1, each of at most 64 MB (at least one item)."""
    step = max(1, _PIECE_BYTES // max(1, item_bytes))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _row_squares(rows: FloatArray) -> Float64Array:
    """Squared norms of rows [n, d], in float64; an overflow is reported by whoever reads the result."""
    squares = np.empty(len(rows))
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in _pieces(len(rows), 64 * 8 * rows.shape[1]):  # of 1 MB, so that what is widened stays in the cache
            wide = rows[piece].astype(np.float64)
            squares[piece] = np.einsum("nd,nd->n", wide, wide)
    return squares


def require_finite(squared_norms: Float64Array) -> Float64Array:
    """`squared_norms` [N], read-only; raises :class:`PursuitError` if one is not finite."""
    bad = np.flatnonzero(~np.isfinite(squared_norms))
    if bad.size:
        raise PursuitError(
            f"{bad.size} of {len(squared_norms)} atoms hold values that are not finite (NaN, infinity or overflow), "
            f"the first is atom {bad[0]}. Drop these examples, or compute their gradients in a wider precision."
        )
    squared_norms.flags.writeable = False
    return squared_norms
