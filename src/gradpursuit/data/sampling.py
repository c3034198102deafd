"""A few rows of a pool, to measure with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradpursuit.config import SourceSection
from gradpursuit.data.formats import count, rows
from gradpursuit.data.json_text import as_json
from gradpursuit.errors import DataError
from gradpursuit.files import write_atomic
from gradpursuit.sources import expand


def draw(sources: Sequence[SourceSection], size: int, folder: Path) -> tuple[list[SourceSection], float]:
    """At most `size` rows of the sources, drawn at random over all of them and written to `folder`.

    Returns:
        Where the rows are (the sources themselves, if they have no more), and how many rows each stands for.

    Raises:
        DataError: a source cannot be read.
    """
    inputs = expand(sources)
    counts = [sum(1 for _ in rows(made)) if (number := count(made)) is None else number for made in inputs]
    total = sum(counts)
    if total <= size:
        return list(sources), 1.0
    chosen = np.sort(np.random.default_rng(0).permutation(total)[:size])
    drawn, start = [], 0
    for number, (made, length) in enumerate(zip(inputs, counts, strict=True)):
        wanted = set((chosen[(chosen >= start) & (chosen < start + length)] - start).tolist())
        start += length
        if not wanted:
            continue
        path = folder / f"{number}.jsonl"
        with write_atomic(path) as file:
            for place, (_, columns) in enumerate(rows(made)):
                if place in wanted:
                    file.write((_line(columns) + "\n").encode())
        drawn.append(SourceSection(path=str(path), name=made.name, columns=made.source.columns))
    return drawn, total / size


def _line(columns: dict[str, Any] | DataError) -> str:
    """A row; one that cannot be read stays one, so that it is dropped and counted here as it is in a run."""
    try:
        return as_json(str(columns) if isinstance(columns, DataError) else columns)
    except DataError as error:
        return as_json(str(error))
