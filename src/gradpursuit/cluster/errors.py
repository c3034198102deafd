"""What goes wrong on a worker, as it is told here."""

from __future__ import annotations

import itertools
import socket
from typing import Any

from gradpursuit import __version__
from gradpursuit.errors import GradPursuitError, RunError, is_out_of_memory
from gradpursuit.shown import without_secrets

_TOLD = 300  # characters of what Ray says


def raised_by(error: Any) -> BaseException:
    """What a worker raised, as it raised it, where it is meant for users; else `error` with its traceback."""
    cause: BaseException = getattr(error, "cause", error)
    return cause if isinstance(cause, GradPursuitError | OSError) or is_out_of_memory(cause) else error


def reason_of(error: BaseException) -> str:
    """What Ray says of a process that it lost, or of a cluster that it did not reach, in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # "The actor died unexpectedly" is followed by lines with a tab (who and where), and then by the reason.
    rest = itertools.dropwhile(lambda line: not line.startswith("\t"), lines)
    told = next((line for line in rest if not line.startswith("\t")), lines[0])
    told = told.strip()
    if len(told) > _TOLD:  # its first sentence, as far as that goes
        told = told[: told.find(". ", 0, _TOLD) + 1] or told[:_TOLD]
    return without_secrets(told)


def require_begun(error: Any) -> None:
    """Refuse to go on after a worker that could not begin: another one could not either.

    Raises:
        RunError: `error` says so; what was raised there is told.
    """
    if getattr(error, "actor_init_failed", False):
        told = [line for line in str(error).splitlines() if line.strip()][-1].strip()
        raise RunError(
            f"a worker cannot begin: {without_secrets(told)}; every node needs the same gradpursuit, with its extra "
            "ray, as this machine"
        )


def require_same_version(driver: str) -> None:
    """Refuse to work for a driver of another version, whose answers could be others.

    Raises:
        RunError: this is another version than `driver`.
    """
    if driver != __version__:
        raise RunError(f"node {socket.gethostname()} has gradpursuit {__version__}, the driver {driver}")
