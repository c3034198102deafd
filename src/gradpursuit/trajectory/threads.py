"""Work on a CPU side by side: threads with batches of their own, each with its share of torch's threads.

Most of what a pass through a model does is no matrix product, and a core that does one leaves room for the other kind
of work beside it: threads with rows of their own wait for each other once a batch, not at every step.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
_M_ARENA_MAX = -8  # malloc.h of glibc


def side_by_side(work: Callable[[int], T], parts: int) -> Iterator[T]:
    """`work(0)` … `work(parts - 1)`, in this order, computed by threads that have an equal share of torch's threads.

    One part, or one thread, is computed by the caller itself. No more is begun than there are threads, and one; when
    the iterator ends, early or with an error of one part, nothing goes on.
    """
    threads = torch.get_num_threads()
    workers = min(threads, parts)
    if workers <= 1:
        yield from (work(part) for part in range(parts))
        return

    def shared(part: int) -> T:
        torch.set_num_threads(threads // workers)
        return work(part)

    begun: deque[Future[T]] = deque()
    try:
        for part in range(parts):
            begun.append(_pool(threads).submit(shared, part))
            if len(begun) > workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()
        wait(begun)
        torch.set_num_threads(threads)  # threads started later take over the last number that was set anywhere


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """One thread for each of torch's, kept, and all of one heap.

    With a heap of its own (glibc's default, changed here for as long as the process lives) a thread could not use
    what another one, or the main thread, has freed: after passes of SmolLM2-135M that is 0.8 GB.
    """
    with suppress(OSError, AttributeError, TypeError):  # other C libraries have no such heaps
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    return ThreadPoolExecutor(threads)
