"""One line for each strategy and budget of a part, over all its targets: `<part>.summary.md`."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from defaults import interval

from gradpursuit.evaluation.statistics import effect
from gradpursuit.files import write_text

REFERENCE, BASE = "gtp", "base"
Cell = dict[str, str]
_HEAD = (
    "strategy", "budget", "gain (95 %)", "log-loss against gtp (95 %)", "gtp better", "detectable", "exact match",
    "copies",
)  # fmt: skip


def write_summary(results: Path, part: str) -> None:
    """Means over targets and seeds of `<part>.cells.csv`; nothing if the part has no base model.

    The gain is of held-out loss over the untouched model. log-loss against gtp is ln(loss / loss of gtp with the same
    budget): positive where gtp does better; `gtp better` counts the pairs of target and seed in which it does.
    """
    with (results / f"{part}.cells.csv").open(encoding="utf-8", newline="") as file:
        cells = [row for row in csv.DictReader(file) if row["target"] == row["scored_on"]]
    base = {row["target"]: float(row["loss"]) for row in cells if row["strategy"] == BASE}
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for row in cells:
        if row["strategy"] != BASE:
            groups.setdefault((row["protocol"], row["strategy"], int(row["budget"] or 0)), []).append(row)
    if not base or not groups:
        return
    targets = list(dict.fromkeys(row["target"] for row in cells))
    lines = [
        f"# {part}: means over {len(targets)} targets\n",
        f"{', '.join(targets)}; every target counts alike. Gain: held-out loss below that of the untouched model, in "
        "nats per supervised token. log-loss: ln(loss / loss of `gtp` with the same budget), positive where `gtp` "
        "does better. Intervals over targets and seeds; detectable: the smallest true log-loss that would have shown "
        "in 80 % of all cases. Copies: chosen rows that repeat another chosen row.\n",
        f"| protocol | {' | '.join(_HEAD)} |",
        "| --- |" + " --- |" * len(_HEAD),
    ]
    for (protocol, strategy, budget), rows in sorted(groups.items(), key=lambda item: (item[0][0], item[0][2])):
        gain = effect(np.array([base[target] - loss for target, loss in _losses(targets, rows)]))
        found = [protocol, strategy, str(budget or "–"), interval(gain)]
        found += _against(targets, rows, groups.get((protocol, REFERENCE, budget)), strategy)
        found += [f"{np.mean([float(row['exact_match']) for row in rows]):.2f}"]
        found += [f"{np.mean([float(row['copies']) for row in rows]):.1f}"]
        lines.append("| " + " | ".join(found) + " |")
    write_text(results / f"{part}.summary.md", "\n".join(lines) + "\n")


def _losses(targets: Sequence[str], rows: Sequence[Cell]) -> Iterator[tuple[str, np.ndarray]]:
    """Of every target, the losses [seeds]."""
    for target in targets:
        yield target, np.array([float(row["loss"]) for row in rows if row["target"] == target])


def _against(targets: Sequence[str], rows: Sequence[Cell], reference: list[Cell] | None, strategy: str) -> list[str]:
    if reference is None or strategy == REFERENCE:
        return ["–", "–", "–"]
    ratio = [np.log(ours / theirs) for (_, ours), (_, theirs) in
             zip(_losses(targets, rows), _losses(targets, reference), strict=True)]  # fmt: skip
    found = effect(np.stack(ratio))
    return [interval(found), f"{found.positive}/{found.pairs}", f"{found.detectable:.3f}"]
