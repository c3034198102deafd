"""The columns that a pursuit holds in memory: their entries, lengths, products with the targets and sketches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gradpursuit.pursuit.matrix import Float64Array, FloatArray, GradientMatrix, IntArray
from gradpursuit.pursuit.rows import Rows

_PIECE_BYTES = 64 * 2**20
_SKETCH = 64  # directions in which atoms are compared before they are compared exactly
# Of vectors this far apart (squared), a sketch of 64 directions shows one of more than 4 times that with a chance
# below 1e-20 (the tail of a chi-squared variable), so that nothing is missed.
_SLACK = 4.0
_NO_IDS: IntArray = np.empty(0, dtype=np.int64)

Scalar = TypeVar("Scalar", bound=np.generic)


class HeldColumns:
    """The columns under consideration, fetched once.

    matrix: where they come from. targets: float64 [D, q]. norms: length of every atom [N].
    capacity: how many columns there is room for at first; memory is taken as it is used.

    A column stays in its slot while it is held; free slots are filled before there are new ones. ids: the column in
    each slot, -1 for none; serials: which load of a column the slot holds or held last, so that who keeps something
    for each slot sees what has changed.

    Memory: columns x D in the precision of the data, plus one piece of 64 MB.
    """

    ids: IntArray
    serials: IntArray
    _rows: FloatArray
    _atb: Float64Array
    _sketch: FloatArray

    def __init__(self, matrix: GradientMatrix, targets: Float64Array, norms: Float64Array, capacity: int) -> None:
        self._matrix, self._targets, self._norms = matrix, targets, norms
        self._capacity = min(capacity, matrix.shape[1])
        self._slot = np.full(matrix.shape[1], -1, dtype=np.int64)
        self._signs = _signs(matrix.shape[0])
        self.fetched_bytes = self._loaded = 0
        self._forget()

    def load(self, ids: IntArray) -> None:
        """Fetch those of `ids` [m] that are not held."""
        new = ids[self._slot[ids] < 0]
        if not new.size:
            return
        slots = np.concatenate([np.flatnonzero(self.ids < 0), np.arange(len(self.ids), len(self.ids) + len(new))])
        slots = slots[: len(new)]
        total = max(len(self.ids), int(slots[-1]) + 1)
        for piece in pieces(len(new), 8 * self._matrix.shape[0]):
            columns = self._matrix.columns(new[piece])
            self._reserve(total, columns.dtype)
            self.fetched_bytes += columns.nbytes
            place = slots[piece]
            self._rows[place] = columns.T
            self._atb[place] = columns.T.astype(np.float64, copy=False) @ self._targets
            unit = np.maximum(self._norms[new[piece], None], np.finfo(np.float64).tiny)
            self._sketch[place] = columns.T @ self._signs.astype(columns.dtype, copy=False) / unit
        self._loaded += len(new)  # first, so that no serial is ever given twice, interrupted or not
        more = np.full(total - len(self.ids), -1)
        self.serials, self.ids = np.concatenate([self.serials, more]), np.concatenate([self.ids, more])
        self.serials[slots] = self._loaded - len(new) + np.arange(len(new))
        self.ids[slots] = new
        self._slot[new] = slots

    def keep(self, ids: IntArray) -> None:
        """Let go of every column but `ids` [m]."""
        kept = np.zeros(len(self.ids), dtype=bool)
        kept[self._slot[ids][self._slot[ids] >= 0]] = True
        gone = np.flatnonzero(~kept & (self.ids >= 0))
        self._slot[self.ids[gone]] = -1
        self.ids[gone] = -1

    def release(self) -> None:
        """Let go of everything, and of its memory; also when another method was interrupted half-way."""
        self._slot[:] = -1
        self._forget()

    def slots(self, ids: IntArray) -> IntArray:
        """Where the held columns `ids` [m] lie: int64 [m]."""
        return self._slot[ids]

    def rows(self) -> Rows:
        """All columns as the rows of one array, by slot; those of free slots mean nothing."""
        return Rows([self._rows[: len(self.ids)]], "the candidates")

    def entries(self, slots: IntArray | slice) -> FloatArray:
        """The columns at `slots` [m] as an array [m, D], in the precision of the data."""
        return self._rows[slots]

    def atb(self, ids: IntArray) -> Float64Array:
        """Products of the held columns `ids` [m] with the targets: float64 [m, q]."""
        return self._atb[self._slot[ids]]

    def alike(self, ids: IntArray, others: IntArray, coherence: float) -> Iterator[tuple[int, IntArray]]:
        """For each of the held `ids` that may have a cosine of at least `coherence` with one of `others`: who.

        Yields (place in `ids`, places in `others`), the places where the sketches are near; none is missed, and
        some may be wrong. No atom is named as near itself.
        """
        apart = _SLACK * 2 * (1.0 - coherence) + 1e-5  # squared distance of unit atoms, and rounding
        left, right = self._sketch[self._slot[ids]], self._sketch[self._slot[others]]
        squares, others_squares = (np.einsum("ij,ij->i", s, s) for s in (left, right))
        for piece in pieces(len(ids), 4 * len(others)):
            near = squares[piece, None] + others_squares - 2 * (left[piece] @ right.T) <= apart
            near &= ids[piece, None] != others
            for place in np.flatnonzero(near.any(axis=1)).tolist():
                yield piece.start + place, np.flatnonzero(near[place])

    def cosines(self, one: int, others: IntArray) -> Float64Array:
        """Cosines of the held column `one` with the held columns `others` [m]: float64 [m], exact."""
        row = self._rows[self._slot[one]].astype(np.float64)
        out = np.empty(len(others))
        for piece in pieces(len(others), 8 * len(row)):
            out[piece] = self._rows[self._slot[others[piece]]].astype(np.float64, copy=False) @ row
        return out / self._norms[one] / self._norms[others]

    def _forget(self) -> None:
        self.ids, self.serials = _NO_IDS, _NO_IDS
        D, q = self._targets.shape
        self._rows = np.empty((0, D), dtype=np.float32)
        self._atb, self._sketch = np.empty((0, q)), np.empty((0, self._signs.shape[1]), dtype=np.float32)

    def _reserve(self, total: int, dtype: np.dtype) -> None:
        """Room for `total` columns; growth by halves keeps one-at-a-time loading from copying everything each time."""
        used = len(self.ids)
        dtype = np.promote_types(self._rows.dtype, dtype) if len(self._rows) else dtype
        if total <= len(self._rows) and dtype == self._rows.dtype:
            return
        room = max(total, min(max(self._capacity, used + used // 2), self._matrix.shape[1]))
        self._rows = _larger(self._rows.astype(dtype, copy=False), room, used)
        self._atb, self._sketch = _larger(self._atb, room, used), _larger(self._sketch, room, used)


def pieces(count: int, item_bytes: int) -> Iterator[slice]:
    """Consecutive slices of 0..count-1, each of at most 64 MB (at least one item)."""
    step = max(1, _PIECE_BYTES // max(1, item_bytes))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _larger(array: NDArray[Scalar], room: int, used: int) -> NDArray[Scalar]:
    larger = np.empty((room, array.shape[1]), dtype=array.dtype)
    larger[:used] = array[:used]
    return larger


def _signs(D: int) -> NDArray[np.float32]:
    """The directions [D, 64] of the sketch, ±1/8, always the same; the axes themselves where D is small."""
    if D <= _SKETCH:
        return np.eye(D, dtype=np.float32)
    bits = np.random.default_rng(0).integers(0, 2, (D, _SKETCH), dtype=np.int8)
    return (2 * bits - 1).astype(np.float32) / np.float32(np.sqrt(_SKETCH))
