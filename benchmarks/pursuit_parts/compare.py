"""`compare`: solvers on the same problems in memory, at the same k."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peers.pursuits import climb

from gradpursuit.pursuit import DenseMatrix, GradientTrajectoryPursuit, NonNegativeOMP

from .growth_law import extrapolate, spans_of
from .solving import (
    ALPHA,
    Peer,
    PeerError,
    Problem,
    compile_kernels,
    described,
    fitted,
    save_problem,
    start_up,
    threads,
)
from .synthetic import LowRank

GTP = f"GTP, alpha = {ALPHA}"
HEADLINE, HEADLINE_SECONDS = (50_000, 4096, 2000), 6.0
GRAM_BYTES = 4 << 30  # of the Gram matrix N x N that a peer may form


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="NxDxK",
        default=["2000x2048x100", "10000x4096x500", "50000x4096x2000"],
        help="rows, dimensions and atoms",
    )
    parser.add_argument("--limit", type=float, default=120.0, help="most seconds of one solve; beyond it is computed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cords", metavar="PYTHON", help="interpreter of CORDS' environment (peers/setup.sh)")
    parser.add_argument("--omp-gpu", metavar="PYTHON", help="interpreter of orthogonal-matching-pursuit-gpu's")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    start = start_up()
    print("start-up: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in start.items()), flush=True)
    compile_kernels()
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes]
    return {"start_up_seconds": start, "problems": [compare(*size, arguments) for size in sizes]}


def compare(N: int, D: int, k: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All solvers on one problem."""
    source = LowRank(D)
    rows, target = source.matrix(N), source.target()
    problem = Problem(DenseMatrix(rows.T), target)
    found: dict[str, Any] = {"N": N, "D": D, "k": k, **source.described(), "mean_square": problem.mean_square}
    passes, solvers = in_turn(problem, rows, k, arguments.rounds)
    found["pass_seconds"], found["solvers"] = passes, solvers
    print(f"\nN = {N:,}, D = {D:,}, k = {k:,}: one pass {passes:.4f} s", flush=True)
    print(f"{'solver':44}{'seconds':>11}{'x GTP':>9}{'at k':>7}{'atoms':>7}{'residual':>10}{'objective':>11}")
    for solver in solvers:
        show(solver, solvers[0]["seconds"])
    for name, solve in in_process(rows, target).items():
        add(solvers, climbed(name, {"rungs": climb(solve, k, arguments.limit)}, k, problem))
    with tempfile.TemporaryDirectory() as folder:
        save_problem(Path(folder), rows, target)
        for peer in peers(arguments, N, problem.mean_square):
            try:
                made = peer.climb(Path(folder), k, arguments.limit, threads())
            except PeerError as error:  # what others found is kept
                print(error)
                solvers.append({"solver": peer.name, "failed": str(error)})
                continue
            what = {"version": made["version"], "what": made["what"]}
            add(solvers, {**climbed(peer.name, made, k, problem), **what})
    if (N, D, k) == HEADLINE:
        met = solvers[0]["seconds"] < HEADLINE_SECONDS
        print(f"target of {HEADLINE_SECONDS:g} s for GTP: {'met' if met else 'MISSED'}")
    return found


def in_turn(problem: Problem, rows: NDArray[np.float32], k: int, rounds: int) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of a pass, and GTP with and without its ridge, round after round: medians."""
    r = problem.target.astype(np.float32)
    passes: list[float] = []
    seconds: dict[float, list[float]] = {ALPHA: [], 0.0: []}
    last: dict[float, Any] = {}
    for _ in range(rounds):
        for alpha, values in seconds.items():
            begin = time.perf_counter()
            problem.matrix.correlate(r)
            passes.append(time.perf_counter() - begin)
            last[alpha], spent = fitted(GradientTrajectoryPursuit(k, alpha=alpha), rows.T, problem.target)
            values.append(spent)
    names = {ALPHA: GTP, 0.0: "GTP, alpha = 0"}
    solvers = [
        {
            "solver": names[alpha],
            "k": k,
            **described(last[alpha], statistics.median(values), problem),
            "every_seconds": values,
        }
        for alpha, values in seconds.items()
    ]
    return statistics.median(passes), solvers


def in_process(rows: NDArray[np.float32], target: NDArray[np.float64]) -> dict[str, Callable[[int], Any]]:
    """The other solvers of this process: k -> weights."""
    from sklearn.linear_model import orthogonal_mp

    short = target.astype(np.float32)

    def sklearn(k: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it ended early, which the number of atoms says
            return orthogonal_mp(rows.T, short, n_nonzero_coefs=k, precompute=False)

    return {
        f"NonNegativeOMP, alpha = {ALPHA}": lambda k: NonNegativeOMP(k, alpha=ALPHA).fit(rows.T, target).coef_,
        "NonNegativeOMP, alpha = 0": lambda k: NonNegativeOMP(k).fit(rows.T, target).coef_,
        "scikit-learn orthogonal_mp (signed)": sklearn,
    }


def peers(arguments: argparse.Namespace, N: int, mean_square: float) -> list[Peer]:
    """The peers whose environments were given."""
    made = []
    if arguments.cords:
        for alpha, ridge in ((ALPHA, ALPHA * mean_square), (0, 0.0)):
            for solver, name in (("numpy", "OrthogonalMP_REG"), ("torch", "OrthogonalMP_REG_Parallel")):
                extra = ("--ridge", repr(ridge), "--solver", solver)
                made.append(Peer(f"CORDS {name}, alpha = {alpha}", "run_cords.py", arguments.cords, extra))
    if arguments.omp_gpu:
        for algorithm in ("naive", "v0"):
            if algorithm == "naive" or 4 * N * N <= GRAM_BYTES:
                extra = ("--algorithm", algorithm)
                made.append(Peer(f"OMP-GPU {algorithm} (signed)", "run_omp_gpu.py", arguments.omp_gpu, extra))
    return made


def climbed(name: str, made: dict[str, Any], k: int, problem: Problem) -> dict[str, Any]:
    """The line of a solver that was climbed to k, or as far as the limit let it."""
    rungs = made["rungs"]
    last = rungs[-1]
    support, weights = np.array(last["support"], np.int64), np.array(last["weights"])
    line = {
        "solver": name,
        "k": last["k"],
        "seconds": last["seconds"],
        "atoms": len(support),
        **problem.quality(support, weights),
        "measured": {rung["k"]: rung["seconds"] for rung in rungs},
    }
    if last.get("stopped_by_itself"):
        return {**line, "stopped_by_itself": True}
    if last["k"] < k:
        line["computed"] = extrapolate(spans_of(made), k)
        line["seconds"] = line["computed"]["seconds"]
    return line


def add(solvers: list[dict[str, Any]], line: dict[str, Any]) -> None:
    """Keep the line of a solver, and print it."""
    solvers.append(line)
    show(line, solvers[0]["seconds"])


def show(line: dict[str, Any], gtp: float) -> None:
    """A line of the table; residual and objective are those at `at k`."""
    line["times_gtp"] = line["seconds"] / gtp
    numbers = f"{line['seconds']:11.3f}{line['times_gtp']:9.2f}{line['k']:7}{line['atoms']:7}"
    remark = "  computed" if "computed" in line else "  stopped by itself" if "stopped_by_itself" in line else ""
    if len(line.get("layers", [])) > 1:
        remark = f"  layers of {' + '.join(map(str, line['layers']))}; quality of the first"
    print(f"{line['solver']:44}{numbers}{line['residual']:10.5f}{line['objective']:11.6f}{remark}", flush=True)
