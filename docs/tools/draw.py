"""Draws the pictures of the documentation: `python docs/tools/draw.py`.

Every figure in them is computed here. Colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

FOLDER = Path(__file__).parent.parent / "pictures"
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2933 }
  .quiet { fill: #5b6773 } .small { font-size: 12px } .bold { font-weight: 600 }
  .line { fill: none; stroke: #1f2933; stroke-width: 1.5 }
  .faint { fill: none; stroke: #9aa5b1; stroke-width: 1 } .dash { stroke-dasharray: 4 4 }
  .target { fill: none; stroke: #c2410c; stroke-width: 3 } .target-fill { fill: #c2410c }
  .chosen { fill: none; stroke: #0f766e; stroke-width: 3 } .chosen-fill { fill: #0f766e }
  .other { fill: none; stroke: #9aa5b1; stroke-width: 2 } .other-fill { fill: #9aa5b1 }
  .box { fill: #0f766e; fill-opacity: .1; stroke: #0f766e; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e7eb } .quiet { fill: #a9b4c0 } .line { stroke: #e4e7eb }
    .faint, .other { stroke: #7b8794 } .other-fill { fill: #7b8794 }
    .target { stroke: #fb923c } .target-fill { fill: #fb923c }
    .chosen { stroke: #2dd4bf } .chosen-fill { fill: #2dd4bf } .box { fill: #2dd4bf; stroke: #2dd4bf }
  }"""
Point = tuple[float, float]


class Picture:
    """An SVG in the making; coordinates in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
            f"<title>{escape(title)}</title><style>{STYLE}\n</style>",
        ]

    def path(self, points: Sequence[Point], kind: str) -> None:
        """A line through points."""
        self._parts.append(f'<path class="{kind}" d="M{" L".join(f"{x:.0f} {y:.0f}" for x, y in points)}"/>')

    def arrow(self, start: Point, stop: Point, kind: str) -> None:
        """A line with a head in its own colour."""
        (x, y), (u, v) = start, stop
        length = float(np.hypot(u - x, v - y))
        dx, dy = (u - x) / length, (v - y) / length
        back: Point = (u - 10 * dx, v - 10 * dy)
        self.path([start, back], kind)
        head = [stop, (back[0] - 5 * dy, back[1] + 5 * dx), (back[0] + 5 * dy, back[1] - 5 * dx)]
        places = " ".join(f"{x:.0f},{y:.0f}" for x, y in head)
        self._parts.append(f'<polygon class="{kind.split()[0]}-fill" points="{places}"/>')

    def dot(self, place: Point, kind: str) -> None:
        """A small disc."""
        self._parts.append(f'<circle class="{kind}-fill" cx="{place[0]:.0f}" cy="{place[1]:.0f}" r="5"/>')

    def ellipse(self, centre: Point, radii: Point) -> None:
        """A level line."""
        (x, y), (a, b) = centre, radii
        self._parts.append(f'<ellipse class="faint" cx="{x:.0f}" cy="{y:.0f}" rx="{a:.0f}" ry="{b:.0f}"/>')

    def box(self, corner: Point, size: Point) -> None:
        """A rounded box."""
        (x, y), (w, h) = corner, size
        self._parts.append(f'<rect class="box" x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{h:.0f}" rx="8"/>')

    def text(self, place: Point, words: str, kind: str = "", anchor: str = "middle") -> None:
        """One line of text."""
        self._parts.append(
            f'<text class="{kind}" x="{place[0]:.0f}" y="{place[1]:.0f}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def svg(self) -> str:
        """The whole file."""
        return "\n".join([*self._parts, "</svg>\n"])


def unit(degrees: float) -> NDArray[np.float64]:
    """A vector of length 1."""
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])


def joint() -> Picture:
    """Two of six gradients: the two best one by one, and the best two together."""
    made = Picture(720, 330, "Choosing two gradients one by one, and together")
    angles = [29.0, 31.0, 33.0, -8.0, 66.0, 100.0]
    atoms, target = np.stack([unit(angle) for angle in angles], axis=1), unit(42.0)
    cosines = atoms.T @ target
    single = tuple(np.argsort(-cosines)[:2].tolist())
    pairs = {pair: nnls(atoms[:, list(pair)], target) for pair in itertools.combinations(range(len(angles)), 2)}
    together = min(pairs, key=lambda pair: pairs[pair][1])
    for left, title, chosen in ((20, "one by one: the two best cosines", single), (380, "together", together)):
        origin = (left + 110.0, 250.0)
        weights, residual = nnls(atoms[:, list(chosen)], target)
        place = lambda v, origin=origin: (origin[0] + 180 * v[0], origin[1] - 180 * v[1])  # noqa: E731
        for number in range(len(angles)):
            if number not in chosen:
                made.arrow(origin, place(atoms[:, number]), "other")
        for number in chosen:
            made.arrow(origin, place(atoms[:, number]), "chosen")
        made.arrow(origin, place(target), "target")
        sum_of = atoms[:, list(chosen)] @ weights
        if residual > 0.01:
            made.path([place(sum_of), place(target)], "line dash")
        made.text((left + 150, 22), title, "bold")
        made.text((left + 150, 300), f"left unexplained of the target: {100 * residual:.0f} %", "quiet")
    made.text((360, 322), "orange: the target’s gradient; green: chosen; grey: the rest of the pool", "quiet small")
    return made


def trajectory() -> Picture:
    """Checkpoints of the warm-up, the gradients there, and how they are stacked."""
    made = Picture(720, 300, "Gradients at three checkpoints of a warm-up run, stacked")
    places: list[Point] = [(70, 215), (190, 125), (330, 95)]
    made.path([(30, 255), *places, (380, 92)], "line dash")
    target, rows = (58.0, 46.0, 30.0), ((30.0, 62.0), (24.0, 55.0), (2.0, 48.0))
    for t, (place, goal, angles) in enumerate(zip(places, target, rows, strict=True), 1):
        length = 78 - 12 * t
        for angle in angles:
            x, y = length * unit(angle)
            made.arrow(place, (place[0] + x, place[1] - y), "chosen")
        x, y = length * unit(goal)
        made.arrow(place, (place[0] + x, place[1] - y), "target")
        made.dot(place, "other")
        made.text((place[0] + 6, place[1] + 26), f"checkpoint {t}", "quiet small")
    for t in range(3):
        top = 40.0 + 72 * t
        made.box((470, top), (120, 60))
        made.box((630, top), (30, 60))
        made.text((530, top + 35), f"rows at {t + 1}", "small")
        made.text((645, top + 35), f"{t + 1}", "small")
    made.text((530, 28), "A", "bold")
    made.text((645, 28), "b", "bold")
    made.text((530, 276), "one column for each row of the pool", "quiet small")
    made.text((645, 294), "the target", "quiet small")
    return made


def preconditioners() -> Picture:
    """Three gradients as they are, scaled by half of what Adam scales by, and by all of it."""
    made = Picture(720, 300, "Three gradients under three preconditioners")
    gradients = np.array([[4.0, 0.6], [4.0, -0.6], [1.0, 0.5]])
    root = np.array([4.0, 0.4])  # √v̂ of the two parameters
    kinds: list[tuple[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = [
        ("identity: g", lambda g: g),
        ("adam-symmetric: g / √√v̂", lambda g: g / np.sqrt(root)),
        ("adam-centered: g / √v̂", lambda g: g / root),
    ]
    for number, (title, scaled) in enumerate(kinds):
        middle = (80.0 + 240 * number, 150.0)
        vectors = [scaled(g) / np.linalg.norm(scaled(g)) for g in gradients]
        for vector, kind in zip(vectors, ("chosen", "chosen", "target"), strict=True):
            made.arrow(middle, (middle[0] + 120 * vector[0], middle[1] - 120 * vector[1]), kind)
        cosine = float(vectors[0] @ vectors[1])
        made.text((120 + 240 * number, 24), title, "bold")
        made.text((120 + 240 * number, 280), f"cosine of the green two: {cosine:+.2f}", "quiet small")
    return made


def subspace() -> Picture:
    """A row's gradient, and what of it lies in the plane of the target's gradients."""
    made = Picture(720, 300, "Projection of a gradient onto the plane of the target’s gradients")
    origin = (250.0, 215.0)

    def place(x: float, y: float, z: float) -> Point:
        return (origin[0] + 150 * x + 75 * y, origin[1] - 55 * y + 20 * x - 130 * z)

    corners = [(-0.6, -0.7), (1.5, -0.7), (1.5, 1.7), (-0.6, 1.7)]
    made.path([place(x, y, 0) for x, y in [*corners, corners[0]]], "faint")
    for x, y in ((1.2, 0.1), (1.1, 0.6), (0.7, 1.1), (0.2, 1.3)):
        made.arrow(place(0, 0, 0), place(x, y, 0), "target")
    row = (0.9, -0.3, 1.2)
    made.arrow(place(0, 0, 0), place(*row), "other")
    made.arrow(place(0, 0, 0), place(row[0], row[1], 0), "chosen")
    made.path([place(*row), place(row[0], row[1], 0)], "line dash")
    made.text((470, 60), "grey: the gradient of a row of the pool", "", "start")
    made.text((470, 84), "orange: gradients of target examples,", "", "start")
    made.text((470, 104), "which span the subspace", "", "start")
    made.text((470, 128), "green: what of the row is kept", "", "start")
    made.text((470, 152), "dashed: what is dropped", "", "start")
    return made


def pursuit() -> Picture:
    """One iteration of the pursuit."""
    made = Picture(720, 190, "One iteration of the pursuit")
    steps = [
        ("correlate", "every row with", "what is left"),
        ("merge", "the best k/4", "join the support"),
        ("fit", "weights ≥ 0 by", "least squares"),
        ("prune", "to the k largest", "contributions"),
        ("refit", "weights of", "those that stay"),
    ]
    for number, (name, first, second) in enumerate(steps):
        left = 12.0 + 142 * number
        made.box((left, 30), (126, 84))
        made.text((left + 63, 56), name, "bold")
        made.text((left + 63, 80), first, "small")
        made.text((left + 63, 98), second, "small")
        if number:
            made.arrow((left - 16, 72), (left, 72), "other")
    made.path([(643, 114), (643, 150), (75, 150)], "other")
    made.arrow((75, 150), (75, 116), "other")
    made.text(
        (360, 174),
        "again with the new residual, until nothing improves: one pass over the store each time",
        "quiet small",
    )
    return made


PICTURES = {
    "joint": joint,
    "trajectory": trajectory,
    "preconditioners": preconditioners,
    "subspace": subspace,
    "pursuit": pursuit,
}


def draw(folder: Path) -> None:
    """Write all pictures."""
    for name, make in PICTURES.items():
        (folder / f"{name}.svg").write_text(make().svg(), encoding="utf-8")


if __name__ == "__main__":
    draw(FOLDER)
