"""What the process at work in a run folder tells those who look on: `progress.json`, renewed about once a second."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gradpursuit import durable
from gradpursuit.lock import Owner
from gradpursuit.progress import Progress, listening

NAME = "progress.json"
_KINDS: dict[str, Any] = {
    "what": str,
    "unit": str,
    "done": int,
    "total": (int, type(None)),
    "rate": (int, float),
    "updated": (int, float),
}


@contextmanager
def telling(folder: Path, stage: str) -> Iterator[None]:
    """Leave the numbers of every :class:`Progress` in this block in `folder`, as those of `stage`."""
    path = folder / NAME
    part = durable.part_of(path)

    def write(progress: Progress) -> None:
        value = {
            "pid": os.getpid(),
            "stage": stage,
            "what": progress.what,
            "unit": progress.unit,
            "done": progress.done,
            "total": progress.total,
            "rate": progress.rate,
            "updated": time.time(),
        }
        with suppress(OSError):  # a full disk is told by the stage that meets it; looking on must not end the work
            part.unlink(missing_ok=True)
            with os.fdopen(durable.open_new(part), "w", encoding="utf-8") as file:
                file.write(json.dumps(value))  # not synced: it is worth nothing after a crash
            part.replace(path)

    try:
        with listening(write):
            yield
    finally:
        for left in (path, part):
            with suppress(OSError):
                left.unlink(missing_ok=True)


def read_progress(folder: Path, owner: Owner, stage: str) -> dict[str, Any] | None:
    """The numbers that `owner`, at work now, last left for `stage`; None: none yet."""
    try:
        value: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
        known = (value["pid"], value["stage"]) == (owner.pid, stage) and all(
            isinstance(value[name], kinds) for name, kinds in _KINDS.items()
        )
        return value if known else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
