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
        import torch

        if X.ndim != 2 or 0 in X.shape or not X.dtype.is_floating_point:
            raise PursuitError(
                f"the tensor has shape {tuple(X.shape)} and type {X.dtype}; a pursuit needs floats [D, N] with at "
                "least one row and one column. Pass the features of the pool as columns, for example `features.T`."
            )
        self._rows = X.detach().T
        self._wide = torch.float64 if X.dtype == torch.float64 else torch.float32
        squares = [(rows.double() ** 2).sum(1).cpu().numpy() for _, rows in self._pieces(8 * X.shape[0], widen=False)]
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
        import torch

        vector = torch.as_tensor(np.ascontiguousarray(r)).to(self._rows.device, self._wide)
        if self._rows.dtype == self._wide:
            products = self._rows @ vector
        else:
            products = torch.cat([rows @ vector for _, rows in self._pieces(4 * self.shape[0], widen=True)])
        return products.double().cpu().numpy()

    def columns(self, ids: IntArray) -> FloatArray:
        """The atoms `ids` [m] as an array [D, m], float32 or float64."""
        columns: FloatArray = self._gathered(ids).to(self._wide).cpu().numpy().T
        return columns

    def combine(self, ids: IntArray, x: FloatArray) -> Float64Array:
        """Weighted sum of atoms, float64 [D]."""
        import torch

        total = torch.zeros(self.shape[0], dtype=torch.float64, device=self._rows.device)
        weights = torch.as_tensor(np.asarray(x, dtype=np.float64)).to(self._rows.device)
        step = max(1, _PIECE_BYTES // (8 * self.shape[0]))
        for start in range(0, len(ids), step):
            total += weights[start : start + step] @ self._gathered(ids[start : start + step]).double()
        return total.cpu().numpy()

    def squared_norms(self) -> Float64Array:
        """Squared Euclidean norm of every atom: float64 [N]."""
        return self._squared_norms

    def _gathered(self, ids: IntArray) -> Any:
        import torch

        return self._rows[torch.as_tensor(as_ids(ids, self.shape[1])).to(self._rows.device)]

    def _pieces(self, row_bytes: int, *, widen: bool) -> Any:
        step = max(1, _PIECE_BYTES // row_bytes)
        for start in range(0, self.shape[1], step):
            rows = self._rows[start : start + step]
            yield start, rows.to(self._wide) if widen else rows
