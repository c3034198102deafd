"""Two matrices side by side: atoms already pursued, and new ones."""

from __future__ import annotations

import numpy as np

from gradpursuit.errors import PursuitError
from gradpursuit.pursuit.matrix import Float64Array, FloatArray, GradientMatrix, IntArray


class JoinedMatrix:
    """[old, new] in R^{D x (N + n)}: atoms of `new` have the ids N, …, N + n - 1.

    read_all: False leaves the old atoms out of a pass: their correlation is zero, so that none of them is chosen anew.

    Raises :class:`PursuitError` if the atoms differ in length.
    """

    def __init__(self, old: GradientMatrix, new: GradientMatrix, *, read_all: bool = True) -> None:
        if old.shape[0] != new.shape[0]:
            raise PursuitError(
                f"the new atoms have {new.shape[0]} entries and the old ones {old.shape[0]}. Use the same checkpoints "
                "and the same projection for both."
            )
        self._old, self._new, self._read_all = old, new, read_all

    @property
    def shape(self) -> tuple[int, int]:
        """(D, N + n)."""
        return self._old.shape[0], self._old.shape[1] + self._new.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that one pass reads."""
        return self._new.nbytes + (self._old.nbytes if self._read_all else 0)

    def correlate(self, r: FloatArray) -> Float64Array:
        """A^T r for r [D]: float64 [N + n]; or for r [D, q]: [N + n, q]."""
        new = self._new.correlate(r)
        if self._read_all:
            return np.concatenate([self._old.correlate(r), new])
        return np.concatenate([np.zeros((self._old.shape[1], *new.shape[1:])), new])

    def columns(self, ids: IntArray) -> FloatArray:
        """The atoms `ids` [m] as an array [D, m]."""
        old = ids < self._old.shape[1]
        first, second = self._old.columns(ids[old]), self._new.columns(ids[~old] - self._old.shape[1])
        out = np.empty((len(ids), self.shape[0]), dtype=np.promote_types(first.dtype, second.dtype))
        out[old], out[~old] = first.T, second.T
        return out.T

    def combine(self, ids: IntArray, x: FloatArray) -> Float64Array:
        """The weighted sum of the atoms `ids` [m] with weights x [m]: float64 [D]."""
        old = ids < self._old.shape[1]
        return self._old.combine(ids[old], x[old]) + self._new.combine(ids[~old] - self._old.shape[1], x[~old])

    def squared_norms(self) -> Float64Array:
        """Squared Euclidean norm of every atom: float64 [N + n]."""
        return np.concatenate([self._old.squared_norms(), self._new.squared_norms()])
