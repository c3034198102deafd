"""The comparison as it is printed at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from gradpursuit.evaluation.table import Line


def comparison_table(lines: Sequence[Line]) -> Table:
    """Held-out loss before and after fine-tuning, per strategy and seed, and the copies among the chosen."""
    seeds = range(max(len(line.losses) for line in lines))
    table = Table(title="Held-out target loss (nats per supervised token; lower is better)")
    table.add_column("strategy")
    for name in ("examples", "copies", "before", *(f"after, seed {seed}" for seed in seeds), "mean after"):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(
            line.strategy,
            str(line.examples),
            f"{line.copies:g}",
            f"{line.before:.3f}",
            *(f"{loss:.3f}" for loss in line.losses),
            f"{line.after:.3f}",
        )
    return table


def timing_table(manifest: dict[str, Any]) -> Table:
    """Seconds of every finished stage; of the selection also per strategy."""
    table = Table(title="Time of each stage")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    total = 0.0
    for name, entry in manifest["stages"].items():
        if "seconds" not in entry:
            continue
        table.add_row(name, f"{entry['seconds']:.1f}")
        total += entry["seconds"]
        for strategy, seconds in entry["detail"].get("seconds", {}).items():
            table.add_row(f"  {strategy}", f"{seconds:.2f}")
    table.add_row("total", f"{total:.1f}")
    return table
