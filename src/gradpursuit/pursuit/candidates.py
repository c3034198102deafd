"""What a pursuit holds in memory: the columns it is looking at, their products, and who is a copy of whom."""

from __future__ import annotations

import numpy as np

from gradpursuit.pursuit.matrix import Float64Array, FloatArray, GradientMatrix, IntArray

_PIECE_BYTES = 64 * 2**20
_NO_IDS: IntArray = np.empty(0, dtype=np.int64)


class CandidateCache:
    """The columns under consideration with their Gram matrix and their products with the target.

    Only products of new columns are ever computed, in float64. Memory: held columns x D in the precision
    of the data, plus their Gram matrix.
    """

    def __init__(self, matrix: GradientMatrix, target: Float64Array) -> None:
        self._matrix, self._target = matrix, target
        self._slot = np.full(matrix.shape[1], -1, dtype=np.int64)
        self._ids = _NO_IDS
        self._rows: FloatArray = np.empty((0, matrix.shape[0]), dtype=np.float32)
        self._gram = np.empty((0, 0))
        self._atb = np.empty(0)

    def load(self, ids: IntArray) -> None:
        """Fetch those of `ids` [m] that are not held and form their products with all that are."""
        new = ids[self._slot[ids] < 0]
        if not new.size:
            return
        held, total = len(self._ids), len(self._ids) + len(new)
        rows = self._matrix.columns(new).T
        self._reserve(total, rows.dtype)
        self._rows[held:total] = rows
        self._gram[held:total, :total] = _products(self._rows[held:total], self._rows[:total])
        self._gram[:held, held:total] = self._gram[held:total, :held].T
        self._atb[held:total] = _products(self._rows[held:total], self._target[None])[:, 0]
        self._slot[new] = np.arange(held, total)
        self._ids = np.concatenate([self._ids, new])

    def keep(self, ids: IntArray) -> None:
        """Let go of every column but `ids` [m]."""
        slots = np.sort(self._slot[ids][self._slot[ids] >= 0])
        if len(slots) == len(self._ids):
            return
        self._slot[self._ids] = -1
        self._ids = self._ids[slots]
        self._slot[self._ids] = np.arange(len(slots))
        self._rows = self._rows[slots]
        self._gram = self._gram[np.ix_(slots, slots)]
        self._atb = self._atb[slots]

    def gram(self, ids: IntArray, others: IntArray | None = None) -> Float64Array:
        """Products of the held columns `ids` [m] with `others` (default: themselves): float64 [m, n]."""
        return self._gram[np.ix_(self._slot[ids], self._slot[ids if others is None else others])]

    def atb(self, ids: IntArray) -> Float64Array:
        """Products of the held columns `ids` [m] with the target: float64 [m]."""
        return self._atb[self._slot[ids]]

    def residual(self, ids: IntArray, x: Float64Array) -> Float64Array:
        """b - A_ids x for held columns: float64 [D]."""
        r = self._target.copy()
        step = max(1, _PIECE_BYTES // (8 * len(r)))
        for start in range(0, len(ids), step):
            rows = self._rows[self._slot[ids[start : start + step]]]
            r -= x[start : start + step] @ rows.astype(np.float64, copy=False)
        return r

    def _reserve(self, total: int, dtype: np.dtype) -> None:
        """Room for `total` columns; doubling keeps one-at-a-time growth from copying everything each time."""
        held = len(self._ids)
        dtype = np.promote_types(self._rows.dtype, dtype)
        if total <= len(self._rows) and dtype == self._rows.dtype:
            return
        room = max(total, min(2 * held, self._matrix.shape[1]))
        rows = np.empty((room, self._matrix.shape[0]), dtype=dtype)
        gram, atb = np.empty((room, room)), np.empty(room)
        rows[:held], gram[:held, :held], atb[:held] = (
            self._rows[:held],
            self._gram[:held, :held],
            self._atb[:held],
        )
        self._rows, self._gram, self._atb = rows, gram, atb


class CandidatePool:
    """The atoms that may still be chosen, best first, without copies.

    Two atoms are copies of one another if their cosine is at least `max_coherence`. Of a group of copies one
    represents the rest: an atom that is already chosen, else the one of lowest id. The others are set
    aside for good, and :attr:`copies` says for whom. Copies are recognised when they come up as
    candidates, which is in time: nothing is chosen that was not a candidate first. Atoms of norm zero are
    never in the pool.
    """

    def __init__(self, cache: CandidateCache, norms: Float64Array, max_coherence: float | None) -> None:
        self._cache, self._norms = cache, norms
        self._coherence = np.inf if max_coherence is None else float(max_coherence)
        self._available = norms > 0
        self._taken = _NO_IDS
        self._copies: dict[int, int] = {}

    @property
    def copies(self) -> dict[int, int]:
        """Id of each atom set aside -> id of the atom it is a copy of (which is never itself set aside)."""
        return {copy: self._representative(original) for copy, original in sorted(self._copies.items())}

    @property
    def taken(self) -> IntArray:
        """Atoms chosen by earlier layers; the cache must hold them, to recognise their copies."""
        return self._taken

    def take(self, ids: IntArray) -> None:
        """Remove `ids` from the pool; their copies will be recognised and set aside as well."""
        self._available[ids] = False
        self._taken = np.concatenate([self._taken, ids])

    def draw(self, scores: Float64Array, support: IntArray, count: int, least: Float64Array) -> IntArray:
        """Up to `count` distinct atoms outside `support` with scores [N] above `least` [N], best first.

        They are held by the cache afterwards, together with `support` and the taken atoms.
        """
        ranked = self._ranked(scores, support, least)
        protected = np.concatenate([self._taken, support])
        self._cache.load(protected)
        drawn, seen = _NO_IDS, 0
        while drawn.size < count and seen < ranked.size:
            # At least half of `count` at a time, so that long runs of copies take few rounds.
            chunk = ranked[seen : seen + max(count - drawn.size, (count + 1) // 2)]
            seen += chunk.size
            self._cache.load(chunk)
            drawn = np.concatenate([drawn, chunk])
            if self._coherence <= 1:
                drawn = self._distinct(drawn, protected)
                if drawn.size < count:
                    self._cache.keep(np.concatenate([protected, drawn]))
        return drawn[np.lexsort((drawn, -scores[drawn]))][:count]

    def _ranked(self, scores: Float64Array, support: IntArray, least: Float64Array) -> IntArray:
        eligible = self._available & (scores > least)
        eligible[support] = False
        ids = np.flatnonzero(eligible)
        return ids[np.argsort(-scores[ids], kind="stable")]

    def _distinct(self, ids: IntArray, protected: IntArray) -> IntArray:
        """`ids` in ascending order without those that are copies of a protected atom or of a lower id."""
        ids = np.sort(ids)
        if protected.size:
            cosines = self._cosines(ids, protected)
            nearest = cosines.argmax(axis=1)
            copied = cosines[np.arange(len(ids)), nearest] >= self._coherence
            self._set_aside(ids[copied], protected[nearest[copied]])
            ids = ids[~copied]
        alike = np.triu(self._cosines(ids, ids) >= self._coherence, k=1)
        alive = np.ones(len(ids), dtype=bool)
        for i in np.flatnonzero(alike.any(axis=1)):
            if alive[i]:
                copied = alike[i] & alive
                alive[copied] = False
                self._set_aside(ids[copied], np.full(np.count_nonzero(copied), ids[i]))
        return ids[alive]

    def _cosines(self, ids: IntArray, others: IntArray) -> Float64Array:
        return self._cache.gram(ids, others) / self._norms[ids, None] / self._norms[others]

    def _set_aside(self, copies: IntArray, originals: IntArray) -> None:
        self._available[copies] = False
        self._copies.update(zip(copies.tolist(), originals.tolist(), strict=True))

    def _representative(self, original: int) -> int:
        while original in self._copies:
            original = self._copies[original]
        return original


def _products(rows: FloatArray, others: FloatArray) -> Float64Array:
    """rows [m, D] times others [n, D]^T in float64, widening a bounded number of entries at a time."""
    total = np.zeros((len(rows), len(others)))
    step = max(1, _PIECE_BYTES // (8 * (len(rows) + len(others))))
    for start in range(0, rows.shape[1], step):
        left = rows[:, start : start + step].astype(np.float64, copy=False)
        total += left @ others[:, start : start + step].astype(np.float64, copy=False).T
    return total
