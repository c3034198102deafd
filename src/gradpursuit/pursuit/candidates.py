"""The atoms that may still be chosen, best first, and who is a copy of whom."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradpursuit.pursuit.held import HeldColumns
from gradpursuit.pursuit.matrix import Float64Array, IntArray
from gradpursuit.pursuit.ranking import Ranked

_SAME = 1.0 - 1e-12  # the cosine of an atom with itself may fall short of 1 by rounding
_NO_IDS: IntArray = np.empty(0, dtype=np.int64)


class CandidatePool:
    """The atoms that may still be chosen, best first, without copies.

    Two atoms are copies of one another if their cosine is at least `max_coherence`. Of a group of copies one
    represents the rest: an atom that is already chosen, else the one of lowest id. The others are set
    aside for good, and :attr:`copies` says for whom. Copies are recognised when they come up as
    candidates, which is in time: nothing is chosen that was not a candidate first. Atoms of norm zero are
    never in the pool.
    """

    def __init__(self, held: HeldColumns, norms: Float64Array, max_coherence: float | None) -> None:
        self._held = held
        self._coherence = None if max_coherence is None else min(float(max_coherence), _SAME)
        self._available = norms > 0
        self._copies: dict[int, int] = {}
        self.taken = _NO_IDS

    @property
    def copies(self) -> dict[int, int]:
        """Id of each atom set aside -> id of the atom it is a copy of (which is never itself set aside)."""
        return {copy: self._representative(original) for copy, original in sorted(self._copies.items())}

    def set_aside(self, copies: dict[int, int]) -> None:
        """Know of copies that were found earlier."""
        self._available[list(copies)] = False
        self._copies.update(copies)

    def free(self, ids: IntArray) -> NDArray[np.bool_]:
        """Which of `ids` [m] are neither taken, nor set aside, nor of norm zero."""
        return self._available[ids]

    def take(self, ids: IntArray) -> None:
        """Remove `ids` from the pool; their copies will be recognised and set aside as well.

        They must be held from then on, to recognise their copies.
        """
        self._available[ids] = False
        self.taken = np.concatenate([self.taken, ids])

    def excluded(self, support: IntArray) -> IntArray:
        """The atoms that may not be drawn: taken, set aside, or of `support`."""
        return np.union1d(np.flatnonzero(~self._available), support)

    def draw(self, ranking: Ranked, support: IntArray, count: int) -> IntArray:
        """Up to `count` distinct atoms, the best of a ranking that has none of :meth:`excluded`.

        They are held afterwards, together with `support` and the taken atoms.
        """
        protected = np.concatenate([self.taken, support])
        self._held.load(protected)
        drawn, order = _NO_IDS, _NO_IDS
        while drawn.size < count:
            # At least half of `count` at a time, so that long runs of copies take few rounds.
            chunk, _ = ranking.next(max(count - drawn.size, (count + 1) // 2))
            if not chunk.size:
                break
            order = np.concatenate([order, chunk])
            self._held.load(chunk)
            drawn = np.concatenate([drawn, chunk])
            if self._coherence is not None:
                drawn = self._distinct(drawn, protected, self._coherence)
                if drawn.size < count:
                    self._held.keep(np.concatenate([protected, drawn]))
        return order[np.isin(order, drawn)][:count]

    def _distinct(self, ids: IntArray, protected: IntArray, coherence: float) -> IntArray:
        """`ids` in ascending order without those that are copies of a protected atom or of a lower id."""
        ids = np.sort(ids)
        alive = np.ones(len(ids), dtype=bool)
        if protected.size:
            for i, near in self._held.alike(ids, protected, coherence):
                cosines = self._held.cosines(ids[i], protected[near])
                if cosines.max() >= coherence:
                    alive[i] = False
                    self._set_aside(ids[i], protected[near[cosines.argmax()]])
        for i, near in self._held.alike(ids, ids, coherence):
            later = near[(near > i) & alive[near]]
            if alive[i] and later.size:
                copied = later[self._held.cosines(ids[i], ids[later]) >= coherence]
                alive[copied] = False
                for copy in ids[copied].tolist():
                    self._set_aside(copy, ids[i])
        return ids[alive]

    def _set_aside(self, copy: int, original: int) -> None:
        self._available[copy] = False
        self._copies[int(copy)] = int(original)

    def _representative(self, original: int) -> int:
        while original in self._copies:
            original = self._copies[original]
        return original
