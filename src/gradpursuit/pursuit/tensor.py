"""A gradient matrix that stays where its tensor is, on a GPU for example."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit.matrix import Float64Array, FloatArray, IntArray, as_ids, require_finite

_PIECE_BYTES = 256 * 2**20


class TensorMatrix:
    """A torch tensor X [D, N] of float16, bfloat16, float32 or float64, on any device and never copied.

    Passes run there, in the precision of the data (half precision is widened piece by piece to float32); columns and
    sums are handed to the processor. The transposed view of row-contiguous features [N, D] is the fast layout.

    Raises :class:`PursuitError` if X is not a finite, non-empty matrix of floats.
    """

    def __init__(self, X: Any) -> None:
        if X.ndim != 2 or 0 in X.shape or not X.dtype.is_floating_point:
            raise PursuitError(
                f"the tensor has shape {tuple(X.shape)} and type {X.dtype}; a pursuit needs floats [D, N] with at "
                "least one row and one column. Pass the features of the pool as columns, for example `features.T`."
            )
        self._rows = X.detach().T
        # Types and tensors are made by the tensor at hand, so that numbers alone need no torch.
        double = X.new_empty(0).double().dtype
        self._wide = double if X.dtype == double else X.new_empty(0).float().dtype
        squares = [(rows.double() ** 2).sum(1).cpu().numpy() for rows in self._pieces(8 * X.shape[0], widen=False)]
        self._squared_norms = require_finite(np.concatenate(squares))

    @property
    def shape(self) -> tuple[int, int]:
        """(D, N)."""
        return self._rows.shape[1], self._rows.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that one pass reads."""
        return int(self._rows.numel() * self._rows.element_size())

    def correlate(self, r: FloatArray) -> Float64Array:
        """A^T r for r [D]: float64 [N]; or for r [D, q]: [N, q], still one pass."""
        vector = self._rows.new_tensor(np.ascontiguousarray(r), dtype=self._wide)
        if self._rows.dtype == self._wide:
            return (self._rows @ vector).double().cpu().numpy()
        pieces = self._pieces(4 * self.shape[0], widen=True)
        return np.concatenate([(rows @ vector).double().cpu().numpy() for rows in pieces])

    def columns(self, ids: IntArray) -> FloatArray:
        """The atoms `ids` [m] as an array [D, m], float32 or float64."""
        columns: FloatArray = self._gathered(ids).to(self._wide).cpu().numpy().T
        return columns

    def combine(self, ids: IntArray, x: FloatArray) -> Float64Array:
        """Weighted sum of atoms, float64 [D]."""
        weights = self._rows.new_tensor(np.asarray(x), dtype=self._rows.new_empty(0).double().dtype)
        total = weights.new_zeros(self.shape[0])
        step = max(1, _PIECE_BYTES // (8 * self.shape[0]))
        for start in range(0, len(ids), step):
            total += weights[start : start + step] @ self._gathered(ids[start : start + step]).double()
        return total.cpu().numpy()

    def squared_norms(self) -> Float64Array:
        """Squared Euclidean norm of every atom: float64 [N]."""
        return self._squared_norms

    def _gathered(self, ids: IntArray) -> Any:
        places = as_ids(ids, self.shape[1])
        return self._rows[self._rows.new_tensor(places, dtype=self._rows.new_empty(0).long().dtype)]

    def _pieces(self, row_bytes: int, *, widen: bool) -> Any:
        step = max(1, _PIECE_BYTES // row_bytes)
        for start in range(0, self.shape[1], step):
            rows = self._rows[start : start + step]
            yield rows.to(self._wide) if widen else rows
