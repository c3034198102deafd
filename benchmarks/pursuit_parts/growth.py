"""`growth`: how the time of a pursuit grows with N and with D."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpursuit.pursuit import GradientTrajectoryPursuit

from .solving import ALPHA, compile_kernels, fitted
from .synthetic import LowRank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 10_000, 20_000, 40_000, 80_000, 160_000])
    parser.add_argument("--dim", type=int, default=2048, help="D while N grows")
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16_384])
    parser.add_argument("--count", type=int, default=20_000, help="N while D grows")
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("pursuit-growth.png"))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    compile_kernels()
    source = LowRank(arguments.dim)
    rows = source.matrix(max(arguments.rows))
    series: dict[str, list[dict[str, Any]]] = {"N": [], "D": []}
    for N in sorted(arguments.rows):
        series["N"].append(timed(N, arguments.dim, rows[:N], source.target(), arguments))
    del rows
    for D in sorted(arguments.dims):
        source = LowRank(D)
        series["D"].append(timed(arguments.count, D, source.matrix(arguments.count), source.target(), arguments))
    exponents = {name: exponent(points, name) for name, points in series.items()}
    plot(series, exponents, arguments)
    for name, slope in exponents.items():
        print(f"time grows with {name} to the power {slope['seconds']:.2f}, per pass {slope['seconds_per_pass']:.2f}")
    print(f"plot: {arguments.plot}")
    return {"k": arguments.k, "alpha": ALPHA, "exponents": exponents, **LowRank(1).described(), **series}


def timed(
    N: int, D: int, rows: NDArray[np.float32], target: NDArray[np.float64], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One point: the median of the rounds."""
    fits = [fitted(GradientTrajectoryPursuit(arguments.k), rows.T, target) for _ in range(arguments.rounds)]
    seconds, passes = statistics.median(s for _, s in fits), int(fits[0][0].n_iter_)
    point = {"N": N, "D": D, "seconds": seconds, "passes": passes, "seconds_per_pass": seconds / passes}
    print(f"N = {N:7,}  D = {D:6,}  {seconds:8.3f} s  {passes:3} passes", flush=True)
    return point


def exponent(points: list[dict[str, Any]], name: str) -> dict[str, float]:
    """The slopes of straight lines through the points, both axes logarithmic."""
    x = np.log([point[name] for point in points])
    return {
        of: float(np.polyfit(x, np.log([point[of] for point in points]), 1)[0])
        for of in ("seconds", "seconds_per_pass")
    }


def plot(series: dict[str, list[dict[str, Any]]], exponents: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Both series, each with a line of slope 1 to compare with."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    fixed = {"N": f"D = {arguments.dim:,}", "D": f"N = {arguments.count:,}"}
    labels = {"N": "rows of the pool N", "D": "dimensions D"}
    for axis, (name, points) in zip(axes, series.items(), strict=True):
        x = np.array([point[name] for point in points], float)
        y = np.array([point["seconds"] for point in points])
        axis.loglog(x, y, "o-", label=f"measured, slope {exponents[name]['seconds']:.2f}")
        axis.loglog(x, y[-1] * x / x[-1], "--", color="grey", label="linear")
        axis.set(xlabel=labels[name], title=f"k = {arguments.k}, {fixed[name]}")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("seconds of one pursuit")
    figure.savefig(arguments.plot, dpi=150)
    plt.close(figure)
