"""Rows that are left out: listed one by one as they are found, and counted."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from gradpursuit.errors import DataError
from gradpursuit.files import write_atomic

logger = logging.getLogger("gradpursuit")
TOO_LONG = "longer than max_tokens"  # why a row was dropped
_KINDS = 100  # reasons that are counted on their own
_NAMED = 5  # of them that an error names


class Place(Protocol):
    """What a dropped row is known by."""

    @property
    def id(self) -> str:
        """Unique in its split."""
        ...

    @property
    def source(self) -> str:
        """The name of its source."""
        ...

    @property
    def file(self) -> str:
        """The file, folder or hub id it came from."""
        ...

    @property
    def line(self) -> int:
        """Its line there, from 1."""
        ...


def drop_record(split: str, place: Place, reason: str, **more: Any) -> dict[str, Any]:
    """One line of `dropped.jsonl`."""
    record = {"split": split, "id": place.id, "source": place.source, "line": place.line, "reason": reason}
    return {**record, "file": place.file, **more}


class Dropped:
    """`dropped.jsonl`: one line for every row that was left out, written as it is found."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.reasons: Counter[str] = Counter()  # "split: reason"; beyond a hundred of them "split: other reasons"

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Dropped]:
        """The file appears under its name when the block ends without an error; what was dropped is logged."""
        with write_atomic(path) as file:
            made = cls(file)
            yield made
        for reason, number in made.reasons.items():
            logger.warning("dropped %d rows of %s", number, reason)

    def add(self, split: str, place: Place, reason: str, **more: Any) -> None:
        """Write one line; `more` goes into it as well."""
        record = drop_record(split, place, reason, **more)
        line = json.dumps(record, ensure_ascii=False) + "\n"
        self._file.write(line.encode(errors="backslashreplace"))  # halves of characters in JSON's own way
        key = f"{split}: {reason}"
        if key not in self.reasons and len(self.reasons) >= _KINDS:
            key = f"{split}: other reasons"
        self.reasons[key] += 1


class Losses:
    """Counts how many rows of a split are unusable, and why."""

    def __init__(self, name: str, allowed: float) -> None:
        self._name, self._allowed, self._total = name, allowed, 0
        self._reasons: Counter[str] = Counter()
        self._first: Place | None = None

    def count(self, example: Place, reason: str) -> None:
        """One more row, unusable for `reason` if that is not empty."""
        self._total += 1
        if reason:
            self._reasons[reason] += 1
            self._first = self._first or example

    def refuse(self) -> None:
        """Raise if too few rows are left."""
        lost = self._reasons.total()
        if self._first and (lost == self._total or lost > self._allowed * self._total):
            reasons = ", ".join(f"{number} × {reason}" for reason, number in self._reasons.most_common(_NAMED))
            if len(self._reasons) > _NAMED:
                reasons += f", and {len(self._reasons) - _NAMED} other reasons"
            longer = "raise data.max_tokens, " if TOO_LONG in self._reasons else ""
            raise DataError(
                f"{lost} of {self._total} rows of the {self._name} cannot be used ({reasons}; first: "
                f"{self._first.file}:{self._first.line}); {longer}fix the rows, or raise data.max_dropped"
            )
