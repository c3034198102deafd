"""What a comparison found, one line per strategy."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gradpursuit.data import Table
from gradpursuit.evaluation.compare import BASE, Cell
from gradpursuit.files import write_text
from gradpursuit.selection import Selection
from gradpursuit.selection.export import copies_chosen


@dataclass(frozen=True)
class Line:
    """One strategy.

    Attributes:
        strategy: its name.
        examples: chosen rows.
        copies: chosen rows that repeat another chosen row, mean over draws.
        layers: layers of the pursuit; 1 if it did not saturate, 0 for a strategy without layers.
        before: held-out loss of the base model.
        losses: held-out loss after fine-tuning, one per seed.
    """

    strategy: str
    examples: int
    copies: float
    layers: int
    before: float
    losses: list[float]

    @property
    def after(self) -> float:
        """Mean held-out loss over seeds."""
        return sum(self.losses) / len(self.losses)


def tabulate(cells: Sequence[Cell], selections: Mapping[str, Sequence[Selection]], pool: Table) -> list[Line]:
    """Lines in the order of `selections`."""
    before = next(cell.loss for cell in cells if cell.strategy == BASE)
    lines = []
    for name, draws in selections.items():
        losses = [cell.loss for cell in sorted(cells, key=lambda c: c.seed) if cell.strategy == name]
        copies = sum(copies_chosen(draw, pool) for draw in draws) / len(draws)
        layers = int(draws[0].layers.max()) if "path" in draws[0].evidence else 0
        lines.append(Line(name, len(draws[0].indices), copies, layers, before, losses))
    return lines


def write_csv(path: Path, lines: Sequence[Line]) -> None:
    """`table.csv`: one row per strategy and seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["strategy", "seed", "examples", "copies", "layers", "loss_before", "loss_after"])
    for line in lines:
        for seed, loss in enumerate(line.losses):
            writer.writerow([line.strategy, seed, line.examples, line.copies, line.layers, line.before, loss])
    write_text(path, text.getvalue())


def to_json(lines: Sequence[Line]) -> list[dict[str, object]]:
    """Lines as JSON values, with the mean."""
    return [{**asdict(line), "after": line.after} for line in lines]
