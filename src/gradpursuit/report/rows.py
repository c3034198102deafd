"""Rows and what was left out of them, for a terminal: readable with and without colours, and in a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gradpursuit.data.inspection import Inspection, Shown
from gradpursuit.shown import escaped

OPEN, CLOSE = "⟦", "⟧"  # around what is supervised


def print_inspection(found: Inspection, console: Console) -> None:
    """Everything that was found; rows come first, so that the counts stay on the screen."""
    for row in found.shown:
        console.print(_head(row), soft_wrap=True)
        console.print(_marked(row), soft_wrap=True, highlight=False)
        console.print()
    console.print(Group(*_tables(found)))
    for line in _lines(found):
        console.print(Text(escaped(line, lines=False)), soft_wrap=True)


def _head(row: Shown) -> Text:
    place = f"{row.file}:{row.line}" + (f" ({row.source})" if row.source != row.file else "")
    text = f"{row.split} {row.id}  {place}  {row.tokens} tokens, {row.supervised} supervised"
    return Text(escaped(text, lines=False), style="bold cyan")


def _marked(row: Shown) -> Text:
    """The text of a row, what is supervised between marks and in another colour."""
    text = Text()
    for supervised, part in row.segments:
        if supervised:
            text.append(OPEN, style="dim").append(escaped(part), style="bold green").append(CLOSE, style="dim")
        else:
            text.append(escaped(part))
    return text


def _tables(found: Inspection) -> Iterator[RenderableType]:
    sources = Table(title="Sources")
    for heading in ("split", "source", "schema", "rows"):
        sources.add_column(heading, justify="right" if heading == "rows" else "left")
    for split, by_source in found.sources.items():
        for source, schemas in by_source.items():
            for schema, rows in schemas.items():
                sources.add_row(split, Text(escaped(source, lines=False)), schema, str(rows))
    yield sources
    lengths = Table(title="Tokens of the rows that are kept (supervised)")
    lengths.add_column("split")
    lengths.add_column("rows", justify="right")
    names = list(next(iter(found.tokens.values())))
    for name in names:
        lengths.add_column(name, justify="right")
    for split, figures in found.tokens.items():
        supervised = found.supervised[split]
        cells = (f"{figures[name]} ({supervised[name]})" for name in names)
        lengths.add_row(split, str(found.rows[split]), *cells)
    yield lengths
    if found.dropped:
        dropped = Table(title="Rows that are left out")
        for heading in ("split", "reason", "rows", "first"):
            dropped.add_column(heading, justify="right" if heading == "rows" else "left", overflow="fold")
        for drop in found.dropped:
            dropped.add_row(
                drop.split,
                Text(escaped(drop.reason, lines=False)),
                str(drop.rows),
                Text(escaped(drop.first, lines=False)),
            )
        yield dropped


def _share(leak: dict[str, Any]) -> str:
    return f"{leak['coverage']:.0%} of " if "coverage" in leak else ""


def _lines(found: Inspection) -> Iterator[str]:
    yield f"supervised ({OPEN}…{CLOSE}): data.turns {found.turns}; found by {found.masks}"
    kept = "kept" if found.deduplicate == "none" else "removed"
    yield (
        f"duplicates: {found.copies} {found.copies_are} in the pool are {kept} (data.deduplicate {found.deduplicate}); "
        f"{found.distinct} distinct texts up to case and white space stay"
    )
    for cluster in found.clusters:
        yield f"  {cluster['id']}: {cluster['copies']} copies of it are removed"
    removed = sum(drop.rows for drop in found.dropped if drop.split == "pool" and "target or heldout" in drop.reason)
    yield f"leakage: {removed} pool rows hold target text and are removed, {found.leaks_kept} are kept"
    for leak in found.leaks:
        yield f"  {leak['place']}: {leak['id']} holds {_share(leak)}{leak['leaks']}"
    for split, notes in found.notes.items():
        for note, rows in notes.items():
            yield f"note: {split}: {note} ({rows} rows)"
    if not found.dropped:
        yield "no row is left out"
