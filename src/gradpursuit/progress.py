"""Progress of long work, told through `logging`: done, total, rate and time left.

Records carry `record.progress = True`, so that a terminal may show them in place; a log file keeps them all. Whoever
wants the numbers themselves, as `gradpursuit status` does, sets a listener (:func:`listening`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType

logger = logging.getLogger("gradpursuit")
Listener = Callable[["Progress"], None]
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Show `listener` every :class:`Progress` in this block: when it begins, about once a second, and when it ends.

    Those who listen already go on.
    """
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


class Progress:
    """Counts finished units of `what` and logs a line at most every `interval` seconds.

    Use as a context manager; leaving it without an error logs the total time and the mean rate.
    `done` counts the units that an earlier, interrupted run had finished: they do not enter the rate. `ended` tells
    listeners that no more is to come.
    """

    def __init__(self, what: str, total: int, unit: str = "rows", done: int = 0, interval: float = 2.0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.ended = False
        self._interval = interval
        self._start = self._last = self._shown = time.monotonic()
        self._at_start = done

    def __enter__(self) -> Progress:
        self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended = True
        self._show()
        if kind is None:
            seconds = time.monotonic() - self._start
            logger.info("%s: %d %s in %s (%s)", self.what, self.done, self.unit, clock(seconds), self._rate_text())

    @property
    def rate(self) -> float:
        """Units a second, since this began."""
        return (self.done - self._at_start) / max(time.monotonic() - self._start, 1e-9)

    def update(self, units: int = 1) -> None:
        """Count `units` more as finished."""
        self.done += units
        now = time.monotonic()
        if now - self._shown >= 1:
            self._show()
        if now - self._last >= self._interval and self.done < self.total:
            self._last = now
            rate = self.rate
            left = clock((self.total - self.done) / rate) if rate > 0 else "?"
            logger.info(
                "%s: %d/%d %s, %s, %s left",
                self.what,
                self.done,
                self.total,
                self.unit,
                self._rate_text(),
                left,
                extra={"progress": True},
            )

    def _show(self) -> None:
        self._shown = time.monotonic()
        for listener in _listeners.get():
            listener(self)

    def _rate_text(self) -> str:
        return f"{self.rate:.3g} {self.unit}/s"


def clock(seconds: float) -> str:
    """A duration as `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
