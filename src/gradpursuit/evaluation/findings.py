"""What a comparison found: cells gathered into lines, and paired differences between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gradpursuit.data import Table
from gradpursuit.evaluation.compare import BASE, FULL, Cell
from gradpursuit.evaluation.statistics import Effect, effect
from gradpursuit.selection.export import copies_chosen

ALL = "all targets"
WRONG = " for others"  # after the name of a strategy: its subsets for the other targets of a crossed comparison
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """One strategy with one budget, for one target and protocol.

    Attributes:
        strategy: its name, or `full`; with " for others" its subsets for the other targets, mean over these.
        examples: chosen rows.
        copies: chosen rows that repeat another chosen row, mean over draws.
        layers: layers of the pursuit; 1 if it did not saturate, 0 for a strategy without layers.
        before: held-out loss of the base model; NaN if it was not asked for.
        losses: held-out loss after fine-tuning, one per seed.
        matches: share of exact matches, one per seed.
        accuracies: multiple-choice accuracy, one per seed; empty if it was not asked for.
        target: that was scored on, and chosen for unless the strategy says otherwise.
        budget: k, the examples asked for; 0 for the full pool.
        protocol: how long was trained.
        steps: optimizer steps.
        gain: of held-out loss over the base model, over rows × seeds; None without the base model.
    """

    strategy: str
    examples: int
    copies: float
    layers: int
    before: float
    losses: list[float]
    matches: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    target: str = ""
    budget: int = 0
    protocol: str = ""
    steps: int = 0
    gain: Effect | None = None

    @property
    def after(self) -> float:
        """Mean held-out loss over seeds."""
        return sum(self.losses) / len(self.losses)

    @property
    def exact_match(self) -> float | None:
        """Mean share of exact matches over seeds."""
        return sum(self.matches) / len(self.matches) if self.matches else None


@dataclass(frozen=True)
class Difference:
    """How much better the reference is than another: positive values favour it.

    Attributes:
        target: scored on, or `all targets`.
        protocol: of both.
        metric: `loss` (other minus reference) or `exact-match` or `accuracy` (reference minus other); over all targets
            also `log-loss`, ln of other / reference, in which targets with large losses count no more than others.
        reference, reference_budget, other, other_budget: what is compared.
        effect: over held-out rows × seeds; for all targets over targets × seeds.
    """

    target: str
    protocol: str
    metric: str
    reference: str
    reference_budget: int
    other: str
    other_budget: int
    effect: Effect


class Findings:
    """The cells of a comparison, as tables.

    Args:
        cells: complete or not; only what is there is told.
        pool: rows that their selections index.
        reference: the strategy that the others are compared with.
    """

    def __init__(self, cells: Sequence[Cell], pool: Table, reference: str) -> None:
        self.cells = list(cells)
        self.reference = reference
        own = [cell for cell in self.cells if cell.scored_on == cell.arm.target]
        crossed = [cell for cell in self.cells if cell.scored_on != cell.arm.target and cell.arm.strategy != FULL]
        self._base = {cell.scored_on: cell for cell in own if cell.arm.strategy == BASE}
        self._groups: dict[tuple[str, str, str, int], list[Cell]] = {}
        for cells, suffix in ((own, ""), (crossed, WRONG)):
            for cell in cells:
                if cell.arm.strategy != BASE:
                    key = (cell.scored_on, cell.protocol, cell.arm.strategy + suffix, cell.arm.budget)
                    self._groups.setdefault(key, []).append(cell)
        self.targets = list(dict.fromkeys(cell.scored_on for cell in own))
        draws = {id(draw): draw for cell in self.cells for draw in cell.arm.draws}
        self._copies = {name: copies_chosen(draw, pool) for name, draw in draws.items()}

    def copies(self, cell: Cell) -> int | None:
        """Rows of the cell's subset that repeat another of its rows; None for the base model."""
        return self._copies.get(id(cell.selection))

    def lines(self) -> list[Line]:
        """By target, protocol, budget and strategy, in the order they were asked for."""
        return [self._line(*key, cells) for key, cells in self._groups.items()]

    def _line(self, target: str, protocol: str, strategy: str, budget: int, cells: list[Cell]) -> Line:
        first, base = cells[0].selection, self._base.get(target)
        assert first is not None  # only the base model has none
        copies = [self._copies[name] for name in {id(draw) for cell in cells for draw in cell.arm.draws}]
        loss, measured = _grid(cells, "loss"), all(cell.result.correct is not None for cell in cells)
        return Line(
            strategy=strategy,
            examples=len(first.indices),
            copies=sum(copies) / len(copies),
            layers=int(first.layers.max()) if "path" in first.evidence else 0,
            before=base.loss if base else float("nan"),
            losses=loss.mean(axis=0).tolist(),
            matches=_grid(cells, "exact-match").mean(axis=0).tolist(),
            accuracies=_grid(cells, "accuracy").mean(axis=0).tolist() if measured else [],
            target=target,
            budget=budget,
            protocol=protocol,
            steps=cells[0].result.steps,
            gain=effect(_rows(base, "loss")[:, None] - loss) if base else None,
        )

    def gains(self) -> dict[tuple[str, int, str], Effect]:
        """Mean gain of held-out loss by (strategy, budget, protocol): over targets × seeds, or of the one target."""
        if len(self.targets) == 1:
            return {(ln.strategy, ln.budget, ln.protocol): ln.gain for ln in self.lines() if ln.gain}
        found: dict[tuple[str, int, str], list[Scores]] = {}
        for (target, protocol, strategy, budget), cells in self._groups.items():
            if target in self._base:
                gain = self._base[target].loss - _grid(cells, "loss").mean(axis=0)
                found.setdefault((strategy, budget, protocol), []).append(gain)
        return {key: effect(np.stack(rows)) for key, rows in found.items() if _complete(rows, len(self.targets))}

    def differences(self) -> list[Difference]:
        """The reference at every budget against every other strategy at every budget, and against the end points."""
        metrics = ["loss", "exact-match"]
        if all(cell.result.correct is not None for cell in self.cells):
            metrics.append("accuracy")
        return [found for metric in metrics for found in self._differences(metric)]

    def _differences(self, metric: str) -> Iterator[Difference]:
        pairs: dict[tuple[str, int, str, int, str], list[Scores]] = {}
        ratios: dict[tuple[str, int, str, int, str], list[Scores]] = {}
        for target in self.targets:
            for reference, other, key in self._pairs(target):
                left, right = _paired(reference, other, metric)
                values = right - left if metric == "loss" else left - right
                yield Difference(target, key[4], metric, *key[:4], effect(values))
                pairs.setdefault(key, []).append(values.mean(axis=0))
                if metric == "loss":
                    ratios.setdefault(key, []).append(np.log(_above(right.mean(axis=0)) / _above(left.mean(axis=0))))
        if len(self.targets) > 1:
            for name, gathered in ((metric, pairs), ("log-loss", ratios)):
                for key, rows in gathered.items():
                    if _complete(rows, len(self.targets)):
                        yield Difference(ALL, key[4], name, *key[:4], effect(np.stack(rows)))

    def _pairs(self, target: str) -> Iterator[tuple[list[Cell], list[Cell], tuple[str, int, str, int, str]]]:
        groups = {key[1:]: cells for key, cells in self._groups.items() if key[0] == target}
        for (protocol, strategy, budget), cells in groups.items():
            if strategy != self.reference:
                continue
            for (other_protocol, other, other_budget), others in groups.items():
                if other != strategy and other_protocol == protocol:
                    yield cells, others, (strategy, budget, other, other_budget, protocol)
            if target in self._base:
                yield cells, [self._base[target]], (strategy, budget, BASE, 0, protocol)


def _above(losses: Scores) -> Scores:
    """Losses are kept with six digits: what is zero there is less than that."""
    return np.maximum(losses, 1e-6)


def _complete(rows: Sequence[Scores], targets: int) -> bool:
    return len(rows) == targets and len({len(row) for row in rows}) == 1


def _rows(cell: Cell, metric: str) -> Scores:
    result = cell.result
    values = {"loss": result.losses, "exact-match": result.matches, "accuracy": result.correct}[metric]
    return np.asarray(values, dtype=np.float64)


def _grid(cells: Sequence[Cell], metric: str) -> Scores:
    """[rows, seeds]: of every seed the mean over its cells, of which there are several for other targets alone."""
    seeds = sorted({cell.seed for cell in cells})
    return np.stack([np.mean([_rows(c, metric) for c in cells if c.seed == seed], axis=0) for seed in seeds], axis=1)


def _paired(left: Sequence[Cell], right: Sequence[Cell], metric: str) -> tuple[Scores, Scores]:
    """Both as [rows, seeds] over the seeds that both have; the base model stands beside every seed."""
    if right[0].arm.strategy == BASE:
        return _grid(left, metric), _grid(right, metric)
    seeds = {cell.seed for cell in left} & {cell.seed for cell in right}
    chosen = ([cell for cell in cells if cell.seed in seeds] for cells in (left, right))
    first, second = (_grid(cells, metric) for cells in chosen)
    return first, second
