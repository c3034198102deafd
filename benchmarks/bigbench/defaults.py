"""The table that chooses the defaults: every variant against `gtp` as it is, on the development targets."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gradpursuit.evaluation.statistics import Effect, effect
from gradpursuit.files import write_text

PREFIX, REFERENCE = "ablation-", ("ablation-strategies", "gtp")
Scores = dict[tuple[str, int], float]  # by target and seed


def write_defaults(results: Path) -> None:
    """`defaults.md`, of the ablations that are there; nothing before the one that the others are compared with is."""
    found = dict(_variants(results))
    if REFERENCE not in found:
        return
    lines = [
        "# Variants of `gtp` on the development targets\n",
        "Differences of means over held-out rows, paired by target and seed, with bootstrap intervals over targets and "
        "seeds. Positive: `gtp` as it is does better. log-loss: ln(loss / loss of `gtp`), in which every target counts "
        "alike; detectable: the smallest true log-loss that would have shown in 80 % of all cases.\n",
        "| variant | budget | loss (95 %) | log-loss (95 %) | detectable | in favour | exact match (95 %) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    reference = found.pop(REFERENCE)
    for (part, strategy), scores in found.items():
        name = strategy if part == REFERENCE[0] else part.removeprefix(PREFIX)
        for budget in (budget for budget, metric in scores if metric == "loss"):
            if scores[budget, "loss"].keys() != reference.get((budget, "loss"), {}).keys():
                lines.append(f"| {name} | {budget} | of other targets, seeds or budgets: run its part again | | | | |")
                continue
            loss = _difference(scores[budget, "loss"], reference[budget, "loss"])
            match = _difference(reference[budget, "exact_match"], scores[budget, "exact_match"])
            ratio = _difference(_logs(scores[budget, "loss"]), _logs(reference[budget, "loss"]))
            cells = [name, budget, interval(loss), interval(ratio), f"{ratio.detectable:.3f}"]
            cells += [f"{loss.positive}/{loss.pairs}" + (f", {loss.ties} ties" if loss.ties else "")]
            lines.append("| " + " | ".join([*cells, interval(match)]) + " |")
    write_text(results / "defaults.md", "\n".join(lines) + "\n")


def _variants(results: Path) -> Iterator[tuple[tuple[str, str], dict[tuple[str, str], Scores]]]:
    """(part, strategy) and its scores by budget and metric."""
    for path in sorted(results.glob(f"{PREFIX}*.cells.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["budget"]]
        for strategy in dict.fromkeys(row["strategy"] for row in rows):
            scores: dict[tuple[str, str], Scores] = {}
            for row in (row for row in rows if row["strategy"] == strategy):
                for metric in ("loss", "exact_match"):
                    cell = scores.setdefault((row["budget"], metric), {})
                    cell[row["target"], int(row["seed"])] = float(row[metric])
            yield (path.name.removesuffix(".cells.csv"), strategy), scores


def _difference(left: Scores, right: Scores) -> Effect:
    """left - right over [targets, seeds]; both of the same."""
    targets, seeds = (list(dict.fromkeys(key[i] for key in left)) for i in (0, 1))
    return effect(np.array([[left[target, seed] - right[target, seed] for seed in seeds] for target in targets]))


def _logs(scores: Scores) -> Scores:
    return {key: math.log(value) for key, value in scores.items()}


def interval(found: Effect) -> str:
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"
