"""Progress of long work, told through `logging`: done, total, rate and time left.

Records carry `record.progress = True`, so that a terminal may show them in place; a log file keeps them all.
"""

from __future__ import annotations

import logging
import time
from types import TracebackType

logger = logging.getLogger("gradpursuit")


class Progress:
    """Counts finished units of `what` and logs a line at most every `interval` seconds.

    Use as a context manager; leaving it without an error logs the total time and the mean rate.
    `done` counts the units that an earlier, interrupted run had finished: they do not enter the rate.
    """

    def __init__(self, what: str, total: int, unit: str = "rows", done: int = 0, interval: float = 2.0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._interval = interval
        self._start = self._last = time.monotonic()
        self._at_start = done

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            seconds = time.monotonic() - self._start
            logger.info("%s: %d %s in %s (%s)", self.what, self.done, self.unit, _clock(seconds), self._rate_text())

    def update(self, units: int = 1) -> None:
        """Count `units` more as finished."""
        self.done += units
        now = time.monotonic()
        if now - self._last >= self._interval and self.done < self.total:
            self._last = now
            rate = (self.done - self._at_start) / (now - self._start)
            left = _clock((self.total - self.done) / rate) if rate > 0 else "?"
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

    def _rate_text(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return f"{(self.done - self._at_start) / seconds:.3g} {self.unit}/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
