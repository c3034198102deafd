"""Selection problems put together by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradpursuit.config import GradientsSection, PursuitSection
from gradpursuit.data import Row
from gradpursuit.features import TrajectoryFeatures
from gradpursuit.selection import SelectionProblem

Rows = Sequence[Sequence[float]]


def trajectory(*checkpoints: Rows, **columns: Rows) -> TrajectoryFeatures:
    """Features [n, d] of every checkpoint, and columns [T, n]."""
    blocks = [[np.asarray(rows, dtype=np.float32)] for rows in checkpoints]
    return TrajectoryFeatures(blocks, {name: np.asarray(values, dtype=np.float32) for name, values in columns.items()})


def row(number: int, *, source: str = "pool.jsonl", prompt: int = 3, answer: int = 2, **columns: Any) -> Row:
    """A row of `prompt` unsupervised and `answer` supervised tokens."""
    ids = list(range(prompt + answer))
    return Row(
        f"row-{number}", f"{number:064x}", source, number + 1, json.dumps(columns), ids, [-100] * prompt + ids[prompt:]
    )


def problem(
    pool: Mapping[str, TrajectoryFeatures],
    target: Mapping[str, TrajectoryFeatures] | None = None,
    *,
    groups: Sequence[int] = (),
    rates: Sequence[float] = (1.0,),
    pursuit: Mapping[str, Any] | None = None,
    **more: Any,
) -> SelectionProblem:
    """A problem with features by label."""
    target = target or {}
    rows = len(next(iter(target.values()))) if target else 0
    n = len(next(iter(pool.values()))) if pool else len(more["rows"])
    return SelectionProblem(
        ids=[f"row-{i}" for i in range(n)],
        pool=pool,
        target=target,
        groups=np.array(groups if len(groups) else [0] * rows, dtype=np.int64),
        rates=np.array(rates, dtype=np.float64),
        gradients=GradientsSection(),
        pursuit=PursuitSection(**(pursuit or {})),
        **more,
    )
