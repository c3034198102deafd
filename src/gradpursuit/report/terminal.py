"""What a command prints when it is done: tables for people, JSON for machines, and only data into a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pathlib import Path

    from gradpursuit.evaluation.findings import Line
    from gradpursuit.verify import StoreCheck


@dataclass(frozen=True)
class Done:
    """What a command has made.

    Attributes:
        folder: where.
        files: what was written there.
        following: the command to type next.
        data: what else machines may want to know.
        tables: what people want to see before that.
    """

    folder: Path
    files: Sequence[Path]
    following: str
    data: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[RenderableType] = ()

    def print(self, *, as_json: bool, quiet: bool) -> None:
        """A summary for people; with `as_json` JSON on stdout instead, and into a pipe the folder, on stdout."""
        if as_json:
            paths = [str(path) for path in self.files]
            value = {"folder": str(self.folder), "files": paths, "next": self.following, **self.data}
            print(json.dumps(value, indent=2, ensure_ascii=False))
            return
        piped = not sys.stdout.isatty()
        if not quiet:
            console = Console(stderr=piped, highlight=False)
            for part in self.summary():
                console.print(part, soft_wrap=isinstance(part, Text))
        if piped:
            print(self.folder)

    def summary(self) -> list[RenderableType]:
        """The tables, the paths of what was written, and what to type next: lines that are never broken."""
        words = [("" if number else "written", str(path), "") for number, path in enumerate(self.files)]
        words.append(("next", self.following, "bold"))
        return [*self.tables, *(Text.assemble((f"{word:<9}", "dim"), (text, style)) for word, text, style in words)]


def comparison_table(lines: Sequence[Line]) -> Table:
    """Held-out loss before and after fine-tuning, per strategy and seed, copies among the chosen, exact matches."""
    seeds = range(max(len(line.losses) for line in lines))
    table = Table(title="Held-out target loss (nats per supervised token; lower is better)")
    places = [name for name in ("target", "protocol") if len({getattr(line, name) for line in lines}) > 1]
    for name in (*places, "strategy"):
        table.add_column(name)
    for name in (
        "examples",
        "copies",
        "before",
        *(f"after, seed {seed}" for seed in seeds),
        "mean after",
        "exact match",
    ):
        table.add_column(name, justify="right")
    for line in lines:
        losses = [f"{loss:.3f}" for loss in line.losses]
        table.add_row(
            *(getattr(line, name) for name in places),
            line.strategy,
            str(line.examples),
            f"{line.copies:g}",
            "–" if isnan(line.before) else f"{line.before:.3f}",
            *losses,
            *[""] * (len(seeds) - len(losses)),
            f"{line.after:.3f}",
            "" if line.exact_match is None else f"{line.exact_match:.2f}",
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


def cost_table(costs: Mapping[str, tuple[float, int]], full_training: float) -> Table:
    """Seconds and bytes on disk that every stage will take, beside fine-tuning on the whole pool."""
    table = Table(title="What the run will cost")
    table.add_column("stage")
    table.add_column("time", justify="right")
    table.add_column("disk", justify="right")
    for name, (seconds, disk) in costs.items():
        table.add_row(name, duration(seconds), size(disk) if disk else "")
    table.add_section()
    total = [sum(values) for values in zip(*costs.values(), strict=True)]
    table.add_row("total", duration(total[0]), size(int(total[1])))
    table.add_row("fine-tuning on the whole pool", duration(full_training), "")
    return table


def check_line(check: StoreCheck) -> str:
    """A store whose rows were computed again, with the one that differs most."""
    found = check.worst
    return (
        f"{check.store} ({check.dtype}): {check.rows} rows computed again one by one, worst 1 - cos {found.lost:.1e} "
        f"('{found.id}' at checkpoint {found.checkpoint})"
    )


def duration(seconds: float) -> str:
    """Seconds for people: 8.3 s, 12.5 min, 7.1 h."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
