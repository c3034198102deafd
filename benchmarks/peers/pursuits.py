"""What the pursuits' benchmark and the peers' scripts share; needs nothing but NumPy.

A solver is climbed: it is timed for the wanted k halved again and again, the smallest first, until the next rung
would take longer than the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

LEAST = 8  # atoms of the lowest rung

Solve = Callable[[int], Any]  # k -> dense weights [N]


def ladder(k: int) -> list[int]:
    """k and its halves down to 8, the smallest first."""
    rungs = [k]
    while rungs[-1] // 2 >= LEAST:
        rungs.append(rungs[-1] // 2)
    return rungs[::-1]


def climb(solve: Solve, k: int, limit: float) -> list[dict[str, Any]]:
    """Time `solve` on every rung up to k, or as far as the next one is expected to take at most `limit` seconds.

    A rung is expected to take as many times longer than the last one as that took longer than the one before, and no
    less than twice as long. It also ends where twice the atoms change nothing: the solver stopped by itself.
    """
    done: list[dict[str, Any]] = []
    for rung in ladder(k):
        if done:
            growth = done[-1]["seconds"] / done[-2]["seconds"] if len(done) > 1 else 2.0
            if done[-1]["seconds"] * max(2.0, growth) > limit:
                break
        begin = time.perf_counter()
        weights = np.asarray(solve(rung), dtype=np.float64)
        seconds = time.perf_counter() - begin
        support = np.flatnonzero(weights)
        stopped = bool(done) and support.tolist() == done[-1]["support"]
        if not stopped:
            done.append(
                {"k": rung, "seconds": seconds, "support": support.tolist(), "weights": weights[support].tolist()}
            )
        else:
            done[-1]["stopped_by_itself"] = True
            break
    return done


def arguments(peer: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=f"Time {peer} on a problem A w = b.")
    parser.add_argument("features", type=Path, help=".npy, float32 [N, D]: the columns of A as rows")
    parser.add_argument("target", type=Path, help=".npy, float32 [D]")
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--k", type=int, required=True, help="atoms wanted")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one solve may be expected to take")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with the number of threads set; call it before the peer is imported."""
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(args.threads), OPENBLAS_NUM_THREADS=str(args.threads))
    return args


def write_result(
    args: argparse.Namespace, peer: str, what: str, rungs: list[dict[str, Any]], iterations: list[Any] | None = None
) -> None:
    """iterations: (atoms, seconds) of those of the last rung, where the script could tell."""
    result = {
        "peer": peer,
        "version": version(peer),
        "what": what,
        "threads": args.threads,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "rungs": rungs,
        "iterations": iterations or [],
    }
    args.output.write_text(json.dumps(result) + "\n")
    print(", ".join(f"k = {rung['k']}: {rung['seconds']:.3f} s" for rung in rungs))
