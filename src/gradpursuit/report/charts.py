"""The geometry of the charts: plain numbers to lines and areas in a plane of 100 × 100, which the page stretches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in percent, and its text."""

    place: float
    text: str


@dataclass(frozen=True)
class Shape:
    """A curve: what it shows, how it is drawn (`line`, `area`, `rule` or `dot`), its colour's name and its SVG path."""

    name: str
    kind: str
    colour: str
    path: str


@dataclass(frozen=True)
class Chart:
    """One chart: a summary for those who do not see it, the names of the axes, their marks, and the curves."""

    summary: str
    across: str
    up: str
    xs: list[Tick]
    ys: list[Tick]
    shapes: list[Shape]
    note: Tick | None = None
    legend: list[tuple[str, str]] = field(default_factory=list)


class Plane:
    """Places in percent of a plane: x to the right, y upwards, between the given limits."""

    def __init__(self, x: Point, y: Point) -> None:
        self._x, self._y = x, y

    def x(self, value: float) -> float:
        """From the left edge."""
        low, high = self._x
        return round(100 * (value - low) / ((high - low) or 1), 2)

    def y(self, value: float) -> float:
        """From the upper edge."""
        low, high = self._y
        return round(100 - 100 * (value - low) / ((high - low) or 1), 2)

    def line(self, points: Sequence[Point]) -> str:
        """An open curve."""
        return "M" + " L".join(f"{self.x(x):g} {self.y(y):g}" for x, y in points)

    def area(self, points: Sequence[Point]) -> str:
        """The curve, closed along the lower edge."""
        return f"{self.line(points)} L{self.x(points[-1][0]):g} 100 L{self.x(points[0][0]):g} 100 Z"

    def rule(self, value: float) -> str:
        """An upright line."""
        return f"M{self.x(value):g} 0 V100"

    def level(self, value: float) -> str:
        """A level line."""
        return f"M0 {self.y(value):g} H100"

    def dots(self, points: Sequence[Point]) -> str:
        """Dots: strokes of no length with round ends, which no stretching turns into ellipses."""
        return " ".join(f"M{self.x(x):g} {self.y(y):g} h0.001" for x, y in points)


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low or 1) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low or 1) / (factor * step) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def residual_chart(budgets: Mapping[str, Any]) -> Chart:
    """Relative residual against budget, from nothing (1) to the whole, with the knee."""
    points = [(0.0, 1.0), *((float(p["budget"]), p["relative_residual"]) for p in budgets["path"])]
    xs = round_ticks(0, points[-1][0])
    ys = round_ticks(min(y for _, y in points), max(1.0, *(y for _, y in points)))
    plane = Plane((0, max(points[-1][0], xs[-1])), (ys[0], ys[-1]))
    knee, last = budgets["knee"], points[-1]
    summary = (
        f"The relative residual falls from 1 without any row to {last[1]:.3f} with {last[0]:.0f} rows; "
        f"the knee lies at {knee['budget']} rows, where it is {knee['relative_residual']:.3f}."
    )
    return Chart(
        summary,
        "rows",
        "relative residual",
        [Tick(plane.x(x), f"{x:g}") for x in xs],
        [Tick(plane.y(y), f"{y:g}") for y in ys],
        [
            Shape("residual", "line", "accent", plane.line(points)),
            Shape("budgets", "dot", "accent", plane.dots(points[1:])),
            Shape("knee", "rule", "warm", plane.rule(knee["budget"])),
            Shape("knee", "dot", "warm", plane.dots([(knee["budget"], knee["relative_residual"])])),
        ],
        note=Tick(plane.x(knee["budget"]), f"knee: {knee['budget']} rows"),
    )


def weights_chart(falling: Sequence[float]) -> Chart:
    """The weights, the largest first, beside the mean of 1."""
    shown = list(falling) if len(falling) <= 400 else [falling[i * len(falling) // 400] for i in range(400)]
    width = len(falling) / len(shown)
    points = [(x * width, y) for i, y in enumerate(shown) for x in (i, i + 1)]
    xs, ys = round_ticks(0, len(falling)), round_ticks(0, max(1.0, falling[0]), 4)
    plane = Plane((0, max(len(falling), xs[-1])), (0, ys[-1]))
    return Chart(
        f"Weights of the {len(falling)} rows, from {falling[0]:.2f} down to {falling[-1]:.2f}; their mean is 1.",
        "rows, the heaviest first",
        "weight",
        [Tick(plane.x(x), f"{x:g}") for x in xs],
        [Tick(plane.y(y), f"{y:g}") for y in ys],
        [
            Shape("weight", "area", "accent", plane.area(points)),
            Shape("weight", "line", "accent", plane.line(points)),
            Shape("mean", "rule", "quiet", plane.level(1.0)),
        ],
    )


def length_chart(name: str, lengths: Mapping[str, Any], strategy: str) -> Chart:
    """Shares of rows by length, of the pool and of the chosen; the lengths grow geometrically to the right."""
    histogram = lengths["histogram"]
    edges, pool, chosen = histogram["edges"], histogram["pool"], histogram["chosen"][strategy]
    ys = round_ticks(0, max(*pool, *chosen, 0.01), 4)
    plane = Plane((0, len(pool)), (0, ys[-1]))
    steps = {which: _steps(values) for which, values in (("pool", pool), ("chosen", chosen))}
    every = max(1, math.ceil(len(edges) / 6))
    before, after = lengths["pool"]["median"], lengths["chosen"][strategy]["median"]
    return Chart(
        f"{name.capitalize()}: median {before:g} in the pool, {after:g} among the chosen rows.",
        f"{name} in a row",
        "share of rows",
        [Tick(plane.x(i), f"{edge:,}") for i, edge in enumerate(edges) if i % every == 0],
        [Tick(plane.y(y), f"{100 * y:g} %") for y in ys],
        [
            Shape("pool", "area", "quiet", plane.area(steps["pool"])),
            Shape("pool", "line", "quiet", plane.line(steps["pool"])),
            Shape("chosen", "line", "accent", plane.line(steps["chosen"])),
        ],
        legend=[("quiet", "pool"), ("accent", f"chosen by {strategy}")],
    )


def _steps(values: Sequence[float]) -> list[Point]:
    return [(x, value) for i, value in enumerate(values) for x in (float(i), float(i + 1))]


def loss_strip(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every line of the comparison its seeds, its interval and its mean as places in percent of one axis."""
    values = [v for row in rows for v in (*row["losses"], row["low"], row["high"]) if v is not None]
    ticks = round_ticks(min(values), max(values), 4)
    plane = Plane((ticks[0], ticks[-1]), (0, 1))
    return [
        {
            "row": row,
            "mean": plane.x(row["mean"]),
            "low": None if row["low"] is None else plane.x(row["low"]),
            "width": None if row["low"] is None else round(plane.x(row["high"]) - plane.x(row["low"]), 2),
            "seeds": [plane.x(value) for value in row["losses"]],
            "ticks": [Tick(plane.x(tick), f"{tick:g}") for tick in ticks],
        }
        for row in rows
    ]
