"""The features of one checkpoint as they are stored: shards of rows, read by every thread without a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradpursuit.errors import PursuitError

FloatArray = NDArray[np.floating[Any]]
Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Rows are stored in these types; the two-byte floats are handed to the kernels as the integers that hold their bits.
TYPES = {"int8": np.int8, "float16": np.int16, "bfloat16": np.uint16, "float32": np.float32, "float64": np.float64}
_SUM_BYTES = 16 * 2**20  # what one thread sums up before it is added to the rest, in order
_PIECE_BYTES = 8 * 2**20  # what one thread reads at a time: large enough to hide the call, small enough to share out

Task = TypeVar("Task")
Result = TypeVar("Result")


class Rows:
    """N rows of d elements in shards, in order; scales are the caller's.

    shards: arrays [n_s, d] of int8, float16, bfloat16 (of `ml_dtypes`), float32 or float64, all of one width.
        Row-contiguous ones (such as `np.memmap`) are read where they lie; others are copied once.
    where: what messages call them.

    Every method reads the shards in order, in pieces that are shared out among threads (as many as there are
    processors at hand, or NUMBA_NUM_THREADS). Results do not depend on the number of threads.

    Raises :class:`PursuitError` for another type, or widths that differ.
    """

    def __init__(self, shards: Sequence[NDArray[Any]], where: str) -> None:
        self._shards = [_as_bits(shard, where) for shard in shards]
        widths = {shard.shape[1] for shard in self._shards}
        if len(widths) != 1:
            raise PursuitError(f"the shards of {where} have different widths {sorted(widths)}; use one d.")
        self.width = widths.pop()
        self._first = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self.nbytes = sum(shard.nbytes for shard in self._shards)
        self.dtype = np.dtype(np.float64 if any(s.dtype == np.float64 for s in self._shards) else np.float32)

    def __len__(self) -> int:
        return int(self._first[-1])

    def dots(self, R: Float64Array, ids: IntArray | None = None) -> Float64Array:
        """Inner products of each row, or of rows `ids` [n] alone, with each of R [q, d]: float64 [n, q].

        Elements are multiplied and summed in float32, 1,024 at a time, then in float64: within 1e-6·‖row‖·‖r‖ of the
        exact product. Rows of float64 are multiplied and summed in float64.
        """
        from gradpursuit.pursuit import kernels

        wide = np.ascontiguousarray(R)
        out = np.empty((len(self) if ids is None else len(ids), len(R)))
        short = wide.astype(np.float32)

        def dot(task: tuple[NDArray[Any], IntArray, slice | IntArray]) -> None:
            rows, local, where = task
            part = out[where] if isinstance(where, slice) else np.empty((len(where), len(R)))
            kernels.dots(rows, local, wide if rows.dtype == np.float64 else short, part)
            if not isinstance(where, slice):
                out[where] = part

        tasks: list[tuple[NDArray[Any], IntArray, slice | IntArray]]
        tasks = [*self._pieces()] if ids is None else [*self._pieces_of(ids)]
        _do(dot, tasks)
        return out

    def squares(self) -> Float64Array:
        """Squared Euclidean norms, summed in float64: [N]; not finite where an element is not."""
        from gradpursuit.pursuit import kernels

        out = np.empty(len(self))
        _do(lambda task: kernels.squares(*task[:2], out[task[2]]), list(self._pieces()))
        return out

    def gather(self, ids: IntArray, scale: Float64Array, out: FloatArray) -> None:
        """Rows `ids` [m] times `scale` [m]: into out [m, d], float32 or float64."""
        from gradpursuit.pursuit import kernels

        def copy(task: tuple[NDArray[Any], IntArray, IntArray]) -> None:
            rows, local, where = task
            kernels.gather(rows, local, scale[where], where, out)

        _do(copy, list(self._pieces_of(ids)))

    def combine(self, ids: IntArray, weights: Float64Array) -> Float64Array:
        """Sum of the rows `ids` [m] times weights [m]: float64 [d]."""
        from gradpursuit.pursuit import kernels

        def add(task: tuple[NDArray[Any], IntArray, IntArray]) -> Float64Array:
            rows, local, where = task
            part = np.zeros(self.width)
            kernels.accumulate(rows, local, weights[where], part)
            return part

        total = np.zeros(self.width)
        for part in _each(add, list(self._pieces_of(ids, _SUM_BYTES))):
            total += part
        return total

    def _pieces(self) -> Iterator[tuple[NDArray[Any], IntArray, slice]]:
        """All rows in order, in pieces, as (shard, places in it, places among all rows)."""
        for first, shard in zip(self._first.tolist(), self._shards, strict=False):
            for piece in _slices(len(shard), shard.itemsize * self.width, _PIECE_BYTES):
                yield shard, np.arange(piece.start, piece.stop), slice(first + piece.start, first + piece.stop)

    def _pieces_of(
        self, ids: IntArray, piece_bytes: int = _PIECE_BYTES
    ) -> Iterator[tuple[NDArray[Any], IntArray, IntArray]]:
        """The rows `ids` in the order in which they lie, in pieces, as (shard, places in it, places in `ids`)."""
        for shard, local, where in self._located(ids):
            for piece in _slices(len(where), shard.itemsize * self.width, piece_bytes):
                yield shard, local[piece], where[piece]

    def _located(self, ids: IntArray) -> Iterator[tuple[NDArray[Any], IntArray, IntArray]]:
        """The rows `ids` in the order in which they lie, as (shard, their places in it, their places in `ids`)."""
        order = np.argsort(ids, kind="stable")
        bounds = np.searchsorted(ids[order], self._first)
        for first, low, high, shard in zip(self._first.tolist(), bounds, bounds[1:], self._shards, strict=False):
            if low < high:
                where = order[low:high]
                yield shard, ids[where] - first, where


def _as_bits(shard: NDArray[Any], where: str) -> NDArray[Any]:
    array = np.asarray(shard)
    if array.ndim != 2 or array.dtype.name not in TYPES:
        raise PursuitError(
            f"a shard of {where} has shape {array.shape} and type {array.dtype}; shards are arrays [rows, d] of "
            f"{', '.join(TYPES)}. Convert it before it is stacked."
        )
    bits = np.require(array, array.dtype.newbyteorder("="), ["C", "A"]).view(TYPES[array.dtype.name])
    bits.flags.writeable = False  # one compiled kernel for each type, whether the array may be written or not
    return bits


def _slices(count: int, item_bytes: int, piece_bytes: int) -> Iterator[slice]:
    """Consecutive slices of 0..count-1, each of at most `piece_bytes` (at least one item)."""
    step = max(1, piece_bytes // max(1, item_bytes))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _threads() -> int:
    import numba

    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def _each(work: Callable[[Task], Result], tasks: list[Task]) -> Iterator[Result]:
    """Do every task, side by side where there are several; results in the order of the tasks."""
    threads = min(_threads(), len(tasks))
    if threads < 2:
        yield from map(work, tasks)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, tasks)


def _do(work: Callable[[Task], object], tasks: list[Task]) -> None:
    for _ in _each(work, tasks):
        pass
