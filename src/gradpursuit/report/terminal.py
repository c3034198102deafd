"""What a command prints when it is done: tables for people, JSON for machines, and only data into a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from statistics import mean
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gradpursuit.shown import json_text, rich_console

if TYPE_CHECKING:
    from pathlib import Path

    from gradpursuit.evaluation.findings import Line
    from gradpursuit.export_stage import Exported
    from gradpursuit.verify import StoreCheck

_WIDE = 160  # columns


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
            print(json_text(value))
            return
        piped = not sys.stdout.isatty()
        if not quiet:
            console = rich_console(stderr=piped, highlight=False)
            if not console.is_terminal:  # a file or a log has room
                console.width = _WIDE
            for part in self.summary():
                console.print(part, soft_wrap=isinstance(part, Text))
        if piped:
            print(self.folder)

    def summary(self) -> list[RenderableType]:
        """The tables, the paths of what was written, and what to type next: lines that are never broken."""
        words = [("" if number else "written", str(path), "") for number, path in enumerate(self.files)]
        words.append(("next", self.following, "bold"))
        return [*self.tables, *(Text.assemble((f"{word:<9}", "dim"), (text, style)) for word, text, style in words)]


def comparison_tables(lines: Sequence[Line]) -> list[RenderableType]:
    """Of every target and protocol a table: held-out loss before and after fine-tuning, per strategy and seed, copies
    among the chosen, exact matches, accuracy where it was measured."""
    places = list(dict.fromkeys((line.target, line.protocol) for line in lines))
    found: list[RenderableType] = []
    for place in places:
        title = "Held-out target loss (nats per supervised token; lower is better)"
        table = Table(title=", ".join(place) + "\n" + title if len(places) > 1 else title)
        of_place = [line for line in lines if (line.target, line.protocol) == place]
        measured = ("accu-\nracy",) if any(line.accuracies for line in of_place) else ()
        table.add_column("strategy", no_wrap=True)
        for name in ("examples", "copies", "before", "after, by seed", "mean\nafter", "exact\nmatch", *measured):
            # Only the seeds go to a next line on a narrow screen; names and numbers are never cut.
            table.add_column(name, justify="right", no_wrap=name != "after, by seed")
        for line in of_place:
            table.add_row(
                line.strategy,
                str(line.examples),
                f"{round(line.copies, 1):g}",
                "–" if isnan(line.before) else f"{line.before:.3f}",
                " ".join(f"{loss:.3f}" for loss in line.losses),
                f"{line.after:.3f}",
                "" if line.exact_match is None else f"{line.exact_match:.2f}",
                *(f"{mean(line.accuracies):.2f}" if line.accuracies else "" for _ in measured),
            )
        found.append(table)
    return found


def export_table(exported: Exported) -> Table:
    """What a budget bought of every strategy's selection; the budget, and how it was found, is the title."""
    table = Table(title=escape(str(exported.budget)))
    table.add_column("strategy", no_wrap=True)
    for name in ("rows", "tokens", "supervised", "rows, repeated"):
        table.add_column(name, justify="right")
    for strategy, found in exported.figures.items():
        tokens = found["tokens"]
        numbers = (found["rows"], tokens["total"], tokens["supervised"], found["repeated"])
        table.add_row(strategy, *(f"{number:,}" for number in numbers))
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
