"""`results.jsonl`: what was trained and scored, one line each, appended at once and checked by its own sha256.

A line belongs to a training (its rows, weights, steps, seed, model) and to the rows that were scored, not to a place in
a table: whatever asks for the same training again finds it, and changed settings leave old lines unused, not wrong.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradpursuit import durable
from gradpursuit.files import disk_error

logger = logging.getLogger("gradpursuit")


@dataclass(frozen=True)
class Result:
    """One model, scored on one set of rows.

    Attributes:
        training: digest of everything that the training depends on.
        scored: digest of the rows that were scored.
        label: for which cell it was computed, for people.
        steps: optimizer steps.
        losses, matches, correct: as in :class:`~gradpursuit.evaluation.scoring.Scores`.
        train_seconds, score_seconds: the first is 0 for all but the first line of a training.
        device: what computed it.
    """

    training: str
    scored: str
    label: dict[str, Any]
    steps: int
    losses: list[float]
    matches: list[bool]
    correct: list[bool] | None
    train_seconds: float
    score_seconds: float
    device: str


class Journal:
    """The results of a run, by training and scored rows.

    Lines that are torn (the process was killed) or changed are passed over with one warning, and what they held is
    computed again where it is asked for. `broken` are the numbers of these lines, from 1; `quiet` leaves the warning
    to whoever uses what is missing.
    """

    def __init__(self, path: Path, *, quiet: bool = False) -> None:
        self._path = path
        self._found: dict[tuple[str, str], Result] = {}
        self.broken: list[int] = []
        for number, line in enumerate(read_lines(path), 1):
            result = _parsed(line)
            if result is None:
                self.broken.append(number)
            else:
                self._found[result.training, result.scored] = result
        if self.broken and not quiet:
            more = f" and {len(self.broken) - 1} more lines" if len(self.broken) > 1 else ""
            logger.warning("%s:%d%s: torn or changed, passed over", path, self.broken[0], more)

    @property
    def results(self) -> dict[tuple[str, str], Result]:
        """All of them, by training and scored rows."""
        return dict(self._found)

    def get(self, training: str, scored: str, *, accuracy: bool = False) -> Result | None:
        """What is known of a training on these rows; with `accuracy` only a result that has it."""
        result = self._found.get((training, scored))
        return None if result is None or (accuracy and result.correct is None) else result

    def add(self, result: Result) -> None:
        """Append a result: after this returns it is on the disk, and a kill before it leaves the others.

        Raises:
            RunError: the disk is full, or the file cannot be written.
        """
        text = json.dumps(asdict(result), ensure_ascii=False, allow_nan=False)
        line = _line(text, asdict(result))
        try:
            durable.make_folder(self._path.parent)
            new = not self._path.exists()
            with os.fdopen(durable.open_own(self._path, os.O_RDWR | os.O_APPEND), "r+b", buffering=0) as file:
                torn = file.seek(0, os.SEEK_END) > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
                file.write(b"\n" * torn + line.encode() + b"\n")
                os.fsync(file.fileno())
            if new:
                durable.sync_folder(self._path.parent)
        except OSError as error:
            raise disk_error(error, self._path) from error
        self._found[result.training, result.scored] = result

    def take_over(self, path: Path) -> None:
        """Add what another journal knows, as one of an attempt that was interrupted."""
        for result in map(_parsed, read_lines(path)):
            if result is not None and (result.training, result.scored) not in self._found:
                self.add(result)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file; none if there is no such file.

    Raises:
        RunError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise disk_error(error, path) from error
    for line in content.decode("utf-8", errors="replace").splitlines():
        if line.strip():
            yield line


def _parsed(line: str) -> Result | None:
    try:
        value = json.loads(line)
        result = Result(**value["result"])
        text = json.dumps(value["result"], ensure_ascii=False, allow_nan=False)
        return result if line == _line(text, value["result"]) else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _line(text: str, result: dict[str, Any]) -> str:
    return json.dumps({"sha256": _digest(text), "result": result}, ensure_ascii=False, allow_nan=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
