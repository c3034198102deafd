"""`features`: pursuits of the features that a run collected, in the types that they can be stored in."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gradpursuit.config import load_config
from gradpursuit.features import TrajectoryFeatures
from gradpursuit.pipeline import Run
from gradpursuit.pursuit import GradientTrajectoryPursuit, NonNegativeOMP
from gradpursuit.selection import SelectionProblem
from gradpursuit.selection_problem import load_problem
from gradpursuit.store.encoding import DTYPES, encode

from .solving import ALPHA, Problem, compile_kernels, described, fitted

BOUND = 1.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder whose gradients are collected")
    parser.add_argument("--percent", type=float, nargs="+", default=[1, 2, 3, 5, 7, 10])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    compile_kernels()
    folder = arguments.run.resolve()
    loaded = Run(load_config(folder / "config.yaml", [f"run_dir={folder}"]))
    loaded.require("gradients", "the benchmark")
    problem, _ = load_problem(loaded)
    N = len(problem.ids)
    budgets = sorted({max(1, round(N * percent / 100)) for percent in arguments.percent})
    matching = Problem(*problem.matching())
    fitted(GradientTrajectoryPursuit(1), matching.matrix, matching.target)  # rows are read, kernels for them compiled
    print(f"{folder}: N = {N}, D = {len(matching.target):,}, {problem.gradients.preconditioner}", flush=True)
    print(f"\n{'alpha':>6}{'k':>5}" + "".join(f"{name:>11}" for name in _COLUMNS))
    table = [against_omp(matching, k, alpha) for alpha in (ALPHA, 0.0) for k in budgets]
    worst = max(line["residual_ratio"] for line in table)
    print(f"largest ratio of residuals {worst:.4f}: bound of {BOUND} {'held' if worst <= BOUND else 'MISSED'}")
    return {
        "run": folder.name,
        "N": N,
        "D": len(matching.target),
        "table": table,
        "types": types(problem, matching, budgets),
        "knees": knees(matching, sorted({budgets[-1], N // 4, N // 2})),
    }


_COLUMNS = (
    "gtp resid",
    "omp resid",
    "ratio",
    "gtp obj",
    "omp obj",
    "gtp s",
    "omp s",
    "gtp kkt",
    "gtp atoms",
    "omp atoms",
)


def against_omp(problem: Problem, k: int, alpha: float) -> dict[str, Any]:
    """One budget: the first layer of GTP, which is what one solution of non-negative OMP compares with."""
    found = {}
    for name, estimator in (
        ("gtp", GradientTrajectoryPursuit(k, alpha=alpha, saturation="stop")),
        ("omp", NonNegativeOMP(k, alpha=alpha)),
    ):
        solver, seconds = fitted(estimator, problem.matrix, problem.target)
        found[name] = described(solver, seconds, problem)
        found[name] |= problem.quality(solver.support_, solver.coef_[solver.support_], alpha)
    gtp, omp = found["gtp"], found["omp"]
    ratio = gtp["residual"] / omp["residual"]
    numbers = (
        gtp["residual"],
        omp["residual"],
        ratio,
        gtp["objective"],
        omp["objective"],
        gtp["seconds"],
        omp["seconds"],
    )
    text = "".join(f"{number:11.5f}" for number in numbers)
    print(f"{alpha:6}{k:5}{text}{gtp['kkt']:11.1e}{gtp['atoms']:11}{omp['atoms']:11}", flush=True)
    return {"alpha": alpha, "k": k, **found, "residual_ratio": ratio}


def types(problem: SelectionProblem, exact: Problem, budgets: list[int]) -> list[dict[str, Any]]:
    """What is chosen from features stored in each type: the overlap, and the residual on the features themselves.

    residual_ratio: with the weights found on the stored copy; refitted_ratio: with the best weights of that support.
    """
    found = []
    print(f"\n{'type':>9}{'k':>5}{'same atoms':>12}{'residual ratio':>16}{'refitted':>10}")
    for dtype in DTYPES:
        stored = Problem(*stored_as(problem, dtype).matching())
        for k in budgets:
            wide, narrow = (
                fitted(GradientTrajectoryPursuit(k, saturation="stop"), p.matrix, p.target)[0] for p in (exact, stored)
            )
            best = exact.quality(wide.support_, wide.coef_[wide.support_])["residual"]
            support = narrow.support_
            residual = exact.quality(support, narrow.coef_[support])["residual"]
            line = {
                "dtype": dtype,
                "k": k,
                "same": len(np.intersect1d(wide.support_, support)),
                "atoms": [len(wide.support_), len(support)],
                "residual_ratio": residual / best,
                "refitted_ratio": refitted(exact, support) / best,
            }
            found.append(line)
            same = f"{line['same']} of {len(wide.support_)}"
            print(f"{dtype:>9}{k:5}{same:>12}{line['residual_ratio']:16.6f}{line['refitted_ratio']:10.6f}", flush=True)
    return found


def stored_as(problem: SelectionProblem, dtype: str) -> SelectionProblem:
    """The same problem with the pool's features written in `dtype`."""
    pool = {
        label: TrajectoryFeatures(
            [[encode(np.asarray(block, dtype=np.float32), dtype) for block in shards] for shards in features.blocks]
        )
        for label, features in problem.pool.items()
    }
    return replace(problem, pool=pool)


def refitted(problem: Problem, support: Any) -> float:
    """The residual of the best weights that these atoms have."""
    alone = problem.matrix.columns(support)
    alpha = ALPHA * problem.mean_square / float((alone**2).sum(axis=0).mean())  # the same λ
    estimator = GradientTrajectoryPursuit(len(support), alpha=alpha, saturation="stop", max_coherence=None)
    solver, _ = fitted(estimator, alone, problem.target)
    chosen = solver.support_
    return problem.quality(support[chosen], solver.coef_[chosen])["residual"]


def knees(problem: Problem, budgets: list[int]) -> list[dict[str, Any]]:
    """The budget that each rule proposes, from pursuits of several sizes."""
    found = []
    for k in budgets:
        solver, _ = fitted(GradientTrajectoryPursuit(k, alpha=ALPHA), problem.matrix, problem.target)
        for rule in ("gain", "chord"):
            knee = solver.knee(rule)
            found.append({"k": k, **knee._asdict()})
            at = f"{knee.budget} (relative residual {knee.relative_residual:.4f})"
            print(f"knee of a pursuit of k = {k} by '{rule}': {at}")
    return found
