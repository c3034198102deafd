"""The error hierarchy: every failure a user can cause or meet is a :class:`GradPursuitError`.

A message gives the offending value, the cause and the way to mend it. The command line prints it alone,
without a traceback, and exits with :attr:`GradPursuitError.exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class GradPursuitError(Exception):
    """Root of the hierarchy; `str(error)` is the whole message for the user."""

    exit_code = 2
    lines: tuple[str, ...] = ()

    @classmethod
    def of_lines(cls, lines: Iterable[str]) -> Self:
        """An error whose message has several lines; in any other message a line break is part of a value."""
        made = cls("\n".join(found := tuple(lines)))
        made.lines = found
        return made


class ConfigError(GradPursuitError):
    """A key, a value or a combination of values in the configuration is not usable."""


class DataError(GradPursuitError):
    """A pool or target file cannot be read as training examples."""


class ModelError(GradPursuitError):
    """The model or tokenizer cannot be loaded or cannot be used for gradients."""


class TrajectoryError(GradPursuitError):
    """A checkpoint, its adapter or its optimizer state is missing, broken or does not fit."""


class GradientError(GradPursuitError):
    """A per-example gradient is zero, not finite or cannot be formed."""


class StoreError(GradPursuitError):
    """A gradient store is incomplete, corrupt or was made with other settings."""


class PursuitError(GradPursuitError, ValueError):
    """The numbers given to a solver do not form a solvable problem."""


class SelectionError(GradPursuitError):
    """A strategy or a budget cannot be applied to this pool."""


class RunError(GradPursuitError):
    """A run folder does not hold what the next stage needs."""


class DamagedError(RunError):
    """A file of a run is missing, or is not what was written.

    Attributes:
        path: the file.
        reason: what is wrong with it.
        fix: what to do.
    """

    def __init__(self, path: Path, reason: str, fix: str = "put it back from a copy") -> None:
        super().__init__(f"{path}: damaged: {reason}; {fix}")
        self.path, self.reason, self.fix = path, reason, fix

    def __reduce__(self) -> tuple[type[DamagedError], tuple[Path, str, str]]:
        return type(self), (self.path, self.reason, self.fix)


class DownloadError(GradPursuitError):
    """A file could not be fetched, or what was fetched is not what was expected."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt `name`: the nearest of the `known` names and the whole list."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory did not suffice, on a GPU or on the CPU, whose allocator has no type for it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
