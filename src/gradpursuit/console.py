"""What a command prints and logs while it works."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run


class Console(logging.Handler):
    """Prints records to stderr; on a terminal, progress stays on one line."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._terminal, self._open = sys.stderr.isatty(), False

    def clear_line(self) -> None:
        """Leave the progress line, if there is one."""
        if self._open:
            sys.stderr.write("\r\x1b[K")
            self._open = False

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        self.clear_line()
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        if getattr(record, "progress", False) and self._terminal:
            sys.stderr.write(prefix + record.getMessage())
            self._open = True
        else:
            sys.stderr.write(prefix + record.getMessage() + "\n")
        sys.stderr.flush()


def console() -> Console:
    """Print what the package logs; a second call replaces the first's handler."""
    logger = logging.getLogger("gradpursuit")
    for handler in [h for h in logger.handlers if isinstance(h, Console)]:
        logger.removeHandler(handler)
    made = Console()
    logger.addHandler(made)
    logger.propagate = False
    return made


@contextmanager
def at_work(run: Run) -> Iterator[None]:
    """Hold the lock of a run, keep its log, and leave no folder behind if a mistake is met before anything was made."""
    with run.lock as lock:
        handler = _log_file(run.folder)
        try:
            yield
        finally:
            logging.getLogger("gradpursuit").removeHandler(handler)
            handler.close()
            if lock.created and not run.manifest.has_finished("data"):
                lock.discard_folder()


def _log_file(folder: Path) -> logging.Handler:
    from gradpursuit.files import disk_error

    try:
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    except OSError as error:
        raise disk_error(error, folder) from error
    logging.raiseExceptions = False  # a full disk is told once, by whatever stage meets it
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("gradpursuit").addHandler(handler)
    return handler


def quiet_libraries() -> None:
    """Their progress bars and advice would drown the run's own words; errors still come as exceptions."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate)(\..*)?")
