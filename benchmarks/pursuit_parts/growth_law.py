"""Seconds at a k that was not run, from the growth of what an iteration costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

ORDERS = (2, 3)  # of the cost of an iteration in the number of atoms m


class Span(NamedTuple):
    """Seconds that the iterations took which brought the atoms from `begin` to `end`."""

    begin: int
    end: int
    seconds: float


def fit(spans: Sequence[Span], order: int) -> NDArray[np.float64]:
    """c >= 0: c_0 of start-up (in spans from 0 atoms), and an iteration costs Σ_p p c_p m^(p-1), p = 1 … order + 1.

    Relative errors are minimised.
    """
    parts = _parts(spans, order) / np.array([[span.seconds] for span in spans])
    scale = np.where(parts.any(axis=0), parts.max(axis=0), 1.0)
    return nnls(parts / scale, np.ones(len(spans)))[0] / scale


def errors(spans: Sequence[Span], c: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative, of each span."""
    return _parts(spans, len(c) - 2) @ c / np.array([span.seconds for span in spans]) - 1


def extrapolate(spans: Sequence[Span], k: int, more_rows: float = 1.0) -> dict[str, Any]:
    """Seconds at `k`, for as many times more rows, by both orders of growth.

    Of an iteration only the passes over all rows depend on their number; they are its part that does not grow with the
    atoms chosen. `order` is the one that, fitted to the spans up to 0.7 of the most atoms, comes closer to the last
    span; with fewer than three such spans it is 2, which grows less. `share_of_terms`: of start-up, passes, and each
    higher power.
    """
    early = [span for span in spans if span.end <= 0.7 * spans[-1].end]
    orders = {}
    for order in ORDERS:
        c = fit(spans, order)
        terms = c * float(k) ** np.arange(len(c))
        terms[1] *= more_rows
        orders[order] = {
            "seconds": float(terms.sum()),
            "coefficients": c.tolist(),
            "share_of_terms": (terms / terms.sum()).tolist(),
            "worst_relative_error": float(np.abs(errors(spans, c)).max()),
            "error_of_last_predicted": float(errors(spans[-1:], fit(early, order))[0]) if len(early) >= 3 else None,
        }
    best = ORDERS[0]
    if len(early) >= 3:
        best = min(ORDERS, key=lambda order: abs(orders[order]["error_of_last_predicted"]))
    return {"seconds": orders[best]["seconds"], "order": best, "orders": orders}


def spans_of(measured: dict[str, Any]) -> list[Span]:
    """Of a climbed solver: its iterations where it told them, else its whole runs."""
    if measured.get("iterations"):
        return _bins(np.array(measured["iterations"]))
    return [Span(0, rung["k"], rung["seconds"]) for rung in measured["rungs"]]


def _bins(iterations: NDArray[np.float64], count: int = 24) -> list[Span]:
    """The median iteration [(atoms, seconds)] of each of about `count` ranges of atoms, times the range."""
    most = int(iterations[:, 0].max())
    edges = np.unique(np.linspace(1, most + 1, min(count, most) + 1).astype(int))
    spans = []
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        inside = iterations[(iterations[:, 0] >= begin) & (iterations[:, 0] < end), 1]
        if len(inside):
            spans.append(Span(begin, end, float(np.median(inside)) * (end - begin)))
    return spans


def _parts(spans: Sequence[Span], order: int) -> NDArray[np.float64]:
    """What each of c contributes to each span."""
    begin, end = (np.array([getattr(span, name) for span in spans], float)[:, None] for name in ("begin", "end"))
    powers = np.arange(1, order + 2)
    return np.hstack([begin == 0, end**powers - begin**powers])
