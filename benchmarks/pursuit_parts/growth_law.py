"""Seconds at a k that was not run, from those at smaller ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

ORDERS = (2, 3)  # of the cost of an iteration in the number of atoms


def fit(ks: Sequence[int], seconds: Sequence[float], order: int) -> np.ndarray:
    """c >= 0 of T(k) = Σ_p c_p k^p, p = 0 … order + 1: start-up, and the sum of a polynomial cost of each iteration.

    Relative errors are minimised.
    """
    k, T = np.asarray(ks, float), np.asarray(seconds, float)
    powers = k[:, None] ** np.arange(order + 2)
    scale = (powers / T[:, None]).max(axis=0)
    return nnls(powers / T[:, None] / scale, np.ones(len(k)))[0] / scale


def value(c: np.ndarray, k: float) -> float:
    """T(k)."""
    return float((c * float(k) ** np.arange(len(c))).sum())


def extrapolate(ks: Sequence[int], seconds: Sequence[float], k: int, more_rows: float = 1.0) -> dict[str, Any]:
    """Seconds at `k`, for as many times more rows, by both orders of growth.

    Of an iteration only the passes over all rows depend on their number; they are its part that does not grow with the
    atoms chosen. `order` is the one that, fitted to all rungs but the last, comes closer to the last; with fewer than
    four rungs it is 2, which grows less. `share_of_terms`: of start-up, passes, and each higher power.
    """
    orders = {}
    for order in ORDERS:
        c = fit(ks, seconds, order)
        scaled = c * np.where(np.arange(len(c)) == 1, more_rows, 1.0)
        whole = value(scaled, k)
        orders[order] = {
            "seconds": whole,
            "coefficients": c.tolist(),
            "share_of_terms": (scaled * float(k) ** np.arange(len(c)) / whole).tolist(),
            "worst_relative_error": max(abs(value(c, x) / t - 1) for x, t in zip(ks, seconds, strict=True)),
            "error_of_last_predicted": value(fit(ks[:-1], seconds[:-1], order), ks[-1]) / seconds[-1] - 1,
        }
    enough = len(ks) >= 4
    best = min(ORDERS, key=lambda order: abs(orders[order]["error_of_last_predicted"])) if enough else ORDERS[0]
    return {"seconds": orders[best]["seconds"], "order": best, "orders": orders}
