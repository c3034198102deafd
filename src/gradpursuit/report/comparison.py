"""What the comparison found, for the report."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradpursuit.config import OWN
from gradpursuit.report.absent import require

if TYPE_CHECKING:
    from gradpursuit.evaluation.findings import Line
    from gradpursuit.pipeline import Run

_TEXT = ("target", "protocol", "metric", "reference", "other")
_WHOLE = ("reference_budget", "other_budget", "positive", "ties", "pairs")


def comparison(run: Run) -> dict[str, Any]:
    """Held-out scores of every strategy and budget with the interval of its gain, and the paired differences.

    `target` is the one that the run's selection serves; `before` is there if it is the same for all lines.

    Raises:
        AbsentError: nothing was compared yet, or for other selections.
    """
    require(run, "evaluation")
    lines = run.lines()
    before = {line.before for line in lines}
    return {
        "metric": "held-out loss, nats per supervised token",
        "interval": "95 % interval",
        "seeds": max(len(line.losses) for line in lines),
        "before": _number(before.pop()) if len(before) == 1 else None,
        "target": run.config.selection.target or OWN,
        "rows": [_row(line, lines) for line in lines],
        "differences": _differences(run),
    }


def _row(line: Line, lines: Sequence[Line]) -> dict[str, Any]:
    """One line; `low` and `high` bound the loss after fine-tuning by the bootstrap interval of its gain."""
    gain = line.gain if line.gain and not math.isnan(line.gain.low) else None
    return {
        "strategy": line.strategy,
        "label": f"{line.strategy} {line.budget}"
        if len({one.budget for one in lines if one.budget}) > 1
        else line.strategy,
        "group": " · ".join(
            getattr(line, name) for name in ("target", "protocol") if len({getattr(one, name) for one in lines}) > 1
        ),
        "target": line.target,
        "before": _number(line.before),
        "budget": line.budget,
        "examples": line.examples,
        "copies": line.copies,
        "layers": line.layers,
        "steps": line.steps,
        "losses": line.losses,
        "mean": line.after,
        "low": line.before - gain.high if gain else None,
        "high": line.before - gain.low if gain else None,
        "exact_match": line.exact_match,
        "accuracy": sum(line.accuracies) / len(line.accuracies) if line.accuracies else None,
    }


def _differences(run: Run) -> list[dict[str, Any]]:
    """`differences.csv`; what is not a number is null, as are ties where earlier versions did not count them."""
    with (run.folder / "evaluation" / "differences.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return [{"ties": None, **{name: _value(name, text) for name, text in row.items()}} for row in rows]


def _value(name: str, text: str) -> str | int | float | None:
    if name in _TEXT:
        return text
    if name in _WHOLE:
        return int(text)
    return _number(float(text))


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
