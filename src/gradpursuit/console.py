"""What a command prints and logs while it works: on a terminal bars of the work at hand, else plain lines.

All of it goes to stderr; stdout is for what a command was asked for.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from gradpursuit import durable
from gradpursuit.errors import GradPursuitError
from gradpursuit.progress import Progress, listening
from gradpursuit.shown import escaped, rich_console, shown

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress as Display
    from rich.progress import TaskID

    from gradpursuit.pipeline import Run


AGAIN_S = 0.05  # after which an interruption that was lost is repeated
_TOLD = "told"  # what was last told, among the things that are shown


class Console(logging.Handler):
    """Prints records to stderr, and shows every :class:`~gradpursuit.progress.Progress` as a bar if that is a terminal.

    Args:
        quiet: print warnings alone, and no bar.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(logging.WARNING if quiet else logging.INFO)
        self._bars = Bars() if is_terminal() and not quiet else None

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show the work that is done in this block."""
        if self._bars is None:
            yield
            return
        try:
            with listening(self._bars.show):
                yield
        finally:
            self._bars.clear()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; one of progress stays on the last line of a terminal."""
        text = ("warning: " if record.levelno >= logging.WARNING else "") + shown(record.getMessage())
        if self._bars is None:
            print(text, file=sys.stderr, flush=True)
        elif getattr(record, "progress", False):
            self._bars.tell(text)
        else:
            self._bars.print(text, warning=record.levelno >= logging.WARNING)


class Bars:
    """The work at hand on a terminal: a bar for each, with rate and time left; without one, what was last told."""

    def __init__(self) -> None:
        self._console = rich_console(stderr=True, highlight=False)
        self._display: Display | None = None
        self._tasks: dict[object, TaskID] = {}

    def show(self, work: Progress) -> None:
        """Draw how far `work` is; its bar goes when it ends."""
        self._drop(_TOLD)
        self._draw(work, work.what, work.done, work.total, f"{work.done}/{work.total or '?'} {work.unit}", work.rate)
        if work.ended:
            self._drop(work)

    def tell(self, text: str) -> None:
        """Show `text` until something else is shown or printed; bars say what they show better."""
        if not self._tasks.keys() - {_TOLD}:
            self._draw(_TOLD, text, 0, None, "", 0.0)

    def print(self, text: str, *, warning: bool) -> None:
        """A line above the bars."""
        from rich.text import Text

        self._drop(_TOLD)
        self._console.print(Text(text, style="yellow" if warning else ""), soft_wrap=True)

    def clear(self) -> None:
        """Take the bars from the screen."""
        for key in list(self._tasks):
            self._drop(key)

    def _draw(self, key: object, what: str, done: int, total: int | None, count: str, rate: float) -> None:
        from rich.markup import escape

        if self._display is None:
            self._display = _display(self._console)
            self._display.start()
        if key not in self._tasks:
            self._tasks[key] = self._display.add_task("", total=total, count="", rate="")
        speed = f"{rate:.3g}/s" if rate else ""
        self._display.update(
            self._tasks[key],
            description=escape(shown(what)),
            completed=done,
            total=total,
            count=escape(shown(count)),
            rate=speed,
            refresh=True,
        )

    def _drop(self, key: object) -> None:
        if key in self._tasks and self._display is not None:
            self._display.remove_task(self._tasks.pop(key))
            if not self._tasks:
                self._display.stop()
                self._display = None


def _display(console: RichConsole) -> Display:
    """Bars that leave nothing behind, and take few looks a second from the work."""
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Made

    return Made(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[rate]}", style="dim"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        refresh_per_second=4,
    )


class Plain:
    """A stream that writes out control characters of whatever is printed, also by libraries and `argparse`.

    stream: where it goes. secrets: whether secrets are taken out, too.
    """

    def __init__(self, stream: TextIO, *, secrets: bool) -> None:
        self.stream, self._secrets = stream, secrets

    def write(self, text: str) -> int:
        """Print `text`; its line breaks stay."""
        self.stream.write(shown(text, lines=True) if self._secrets else escaped(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def plain_streams() -> Iterator[None]:
    """Whatever is printed in this block cannot steer the terminal; what goes to stderr is without secrets."""
    out, err = sys.stdout, sys.stderr
    sys.stdout = cast(TextIO, Plain(out, secrets=False))
    sys.stderr = cast(TextIO, Plain(err, secrets=True))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


def is_terminal() -> bool:
    """Whether stderr is a terminal that can draw over its lines."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb")


@contextmanager
def console(*, quiet: bool = False) -> Iterator[None]:
    """Print what the package logs in this block, and show its work; `quiet`: warnings alone."""
    logger = logging.getLogger("gradpursuit")
    made = Console(quiet=quiet)
    logger.addHandler(made)
    propagated, logger.propagate = logger.propagate, False
    try:
        with made.showing():
            yield
    finally:
        logger.removeHandler(made)
        logger.propagate = propagated


@contextmanager
def at_work(run: Run) -> Iterator[None]:
    """Hold the lock of a run, keep its log, and leave no folder behind if a mistake is met before anything was made."""
    with run.lock as lock:
        handler = _log_file(run.folder)
        try:
            yield
        except Exception as error:
            if not isinstance(error, GradPursuitError | OSError):
                logging.getLogger("gradpursuit").debug("unexpected error", exc_info=True)
            raise
        finally:
            logging.getLogger("gradpursuit").removeHandler(handler)
            handler.close()
            if lock.created and not run.manifest.has_finished("data"):
                lock.discard_folder()


class _LogFile(logging.StreamHandler[TextIO]):
    """A file that was opened already, without following links."""

    def close(self) -> None:
        """Close the file as well."""
        with suppress(OSError):  # a full disk
            self.stream.close()
        super().close()


class _LogLine(logging.Formatter):
    """One record, one line, but for a traceback; without control characters and secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), lines=bool(record.exc_info))


def _log_file(folder: Path) -> logging.Handler:
    from gradpursuit.files import disk_error

    try:
        file = durable.open_own(folder / "log.txt", os.O_WRONLY | os.O_APPEND)
        handler = _LogFile(os.fdopen(file, "a", encoding="utf-8"))
    except OSError as error:
        raise disk_error(error, folder / "log.txt") from error
    logging.raiseExceptions = False  # a full disk is told once, by whatever stage meets it
    handler.setFormatter(_LogLine("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("gradpursuit").addHandler(handler)
    return handler


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, which schedulers send before they kill, interrupts the block as Ctrl-C does; neither gets lost.

    In the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = signal.signal(signal.SIGTERM, signal.default_int_handler), sys.unraisablehook

    def again(lost: sys.UnraisableHookArgs) -> None:
        # A compiler that calls back (numba's LLVM) and a finalizer cannot pass the interruption on; it comes once more.
        if issubclass(lost.exc_type, KeyboardInterrupt):
            repeat = threading.Timer(AGAIN_S, os.kill, (os.getpid(), signal.SIGINT))
            repeat.daemon = True
            repeat.start()
        else:
            hook(lost)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def quiet_libraries() -> None:
    """Their progress bars and advice would drown the run's own words; errors still come as exceptions."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate)(\..*)?")
