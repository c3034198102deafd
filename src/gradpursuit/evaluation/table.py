"""The tables of a comparison: every cell and every difference as CSV, lines as JSON, both as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gradpursuit.evaluation.compare import Cell
from gradpursuit.evaluation.findings import ALL, Difference, Findings, Line
from gradpursuit.evaluation.statistics import Effect
from gradpursuit.files import write_text

CELL_COLUMNS: dict[str, Callable[[Findings, Cell], Any]] = {
    "target": lambda f, c: c.arm.target,
    "scored_on": lambda f, c: c.scored_on,
    "protocol": lambda f, c: c.protocol,
    "strategy": lambda f, c: c.arm.strategy,
    "budget": lambda f, c: c.arm.budget or "",
    "seed": lambda f, c: c.seed,
    "examples": lambda f, c: 0 if c.selection is None else len(c.selection.indices),
    "copies": lambda f, c: f.copies(c),
    "steps": lambda f, c: c.result.steps,
    "loss": lambda f, c: f"{c.loss:.6f}",
    "exact_match": lambda f, c: f"{c.exact_match:.4f}",
    "accuracy": lambda f, c: "" if c.accuracy is None else f"{c.accuracy:.4f}",
    "train_seconds": lambda f, c: c.result.train_seconds,
    "score_seconds": lambda f, c: c.result.score_seconds,
    "device": lambda f, c: c.result.device,
    "training": lambda f, c: c.result.training[:12],
}


def cells_csv(findings: Findings) -> str:
    """Every cell, one a line; cells that share a training have the same `training`."""
    rows = [[value(findings, cell) for value in CELL_COLUMNS.values()] for cell in findings.cells]
    return _csv(list(CELL_COLUMNS), rows)


def differences_csv(differences: Sequence[Difference]) -> str:
    """Every paired difference, one a line."""
    head = ["target", "protocol", "metric", "reference", "reference_budget", "other", "other_budget"]
    effects = ["difference", "low", "high", "detectable", "positive", "ties", "pairs"]
    rows = []
    for found in differences:
        values = found.effect
        numbers = [f"{value:.6f}" for value in (values.mean, values.low, values.high, values.detectable)]
        rows.append([*(getattr(found, name) for name in head), *numbers, values.positive, values.ties, values.pairs])
    return _csv([*head, *effects], rows)


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def write_tables(folder: Path, findings: Findings) -> None:
    """`table.csv` (every cell), `differences.csv` and `table.md`."""
    differences = findings.differences()
    write_text(folder / "table.csv", cells_csv(findings))
    write_text(folder / "differences.csv", differences_csv(differences))
    write_text(folder / "table.md", markdown(findings, differences))


def markdown(findings: Findings, differences: Sequence[Difference]) -> str:
    """Both tables for people."""
    lines = [_markdown_line(line) for line in findings.lines()]
    parts = ["# Held-out scores\n", "Means over seeds; losses in nats per supervised token.\n", *_head(_LINE), *lines]
    names = ", ".join(findings.targets) if len(findings.targets) > 1 else ""
    parts += [f"\n# `{findings.reference}` against the others\n", _EXPLAINED]
    parts += [f"All targets: {names}.\n"] if names else []
    parts += _head(_DIFFERENCE)
    shown = [d for d in differences if d.target == ALL] or differences
    parts += [_markdown_difference(difference) for difference in shown]
    return "\n".join(parts) + "\n"


_EXPLAINED = (
    "Positive differences favour the reference. Pairs share the seed and the held-out rows; intervals are bootstrapped "
    "over rows (for all targets: over targets) and seeds, each resampled on its own. `detectable` is the smallest true "
    "difference that this design would have told from zero in 80 % of all cases (5 % level, two-sided). `log-loss` is "
    "ln(other / reference) of the losses of each target and seed, so that targets with large losses count no more than "
    "others: 0.1 is a loss lower by a tenth. "
    "`NAME for others`: chosen for the other targets, mean over these.\n"
)


_LINE = (
    "target", "protocol", "strategy", "budget", "chosen", "copies", "steps", "base loss", "loss", "gain (95 %)",
    "exact match", "accuracy",
)  # fmt: skip
_DIFFERENCE = (
    "target", "protocol", "metric", "reference", "other", "difference (95 %)", "detectable", "in favour"
)  # fmt: skip


def _head(names: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]


def _markdown_line(line: Line) -> str:
    match, accuracy = line.exact_match, line.accuracies
    cells = [
        line.target,
        line.protocol,
        line.strategy,
        line.budget or "–",
        line.examples,
        f"{round(line.copies, 1):g}",
        line.steps,
        "–" if np.isnan(line.before) else f"{line.before:.3f}",
        f"{line.after:.3f}",
        _interval(line.gain) if line.gain else "–",
        "–" if match is None else f"{match:.3f}",
        f"{sum(accuracy) / len(accuracy):.3f}" if accuracy else "–",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def _markdown_difference(found: Difference) -> str:
    def named(name: str, budget: int) -> str:
        return f"{name} {budget}" if budget else name

    cells = [
        found.target,
        found.protocol,
        found.metric,
        named(found.reference, found.reference_budget),
        named(found.other, found.other_budget),
        _interval(found.effect),
        "–" if np.isnan(found.effect.detectable) else f"{found.effect.detectable:.3f}",
        f"{found.effect.positive}/{found.effect.pairs}" + (f", {found.effect.ties} ties" if found.effect.ties else ""),
    ]
    return "| " + " | ".join(cells) + " |"


def _interval(found: Effect) -> str:
    return f"{found.mean:.3f}" + ("" if np.isnan(found.low) else f" ({found.low:.3f} to {found.high:.3f})")


def to_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Lines as JSON values, with the mean; what is not a number is null."""
    return [{name: _plain(value) for name, value in {**asdict(line), "after": line.after}.items()} for line in lines]


def from_json(values: Sequence[Mapping[str, Any]]) -> list[Line]:
    """What :func:`to_json` made."""
    made = []
    for value in values:
        known: dict[str, Any] = {name: value[name] for name in Line.__dataclass_fields__}
        if known["before"] is None:
            known["before"] = float("nan")
        if known["gain"]:
            gain: dict[str, Any] = {n: float("nan") if v is None else v for n, v in known["gain"].items()}
            known["gain"] = Effect(**gain)
        made.append(Line(**known))
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and np.isnan(value) else value
