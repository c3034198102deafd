"""What goes wrong on a worker, as it is told here."""

from __future__ import annotations

from typing import Any

from gradpursuit.errors import GradPursuitError


def raised_by(error: Any) -> BaseException:
    """What a worker raised, as it raised it, where it is meant for users; else `error` with its traceback."""
    cause: BaseException = getattr(error, "cause", error)
    return cause if isinstance(cause, GradPursuitError | OSError) else error


def reason_of(error: BaseException) -> str:
    """The first line of what Ray says of a process that it lost."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
