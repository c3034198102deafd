"""Residual and held-out loss against the iteration of the pursuit, and the first rows of top-k beside GTP's."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradpursuit.comparison_stage import comparison_setting
from gradpursuit.config import load_config
from gradpursuit.evaluation.compare import Arm, Comparison
from gradpursuit.files import write_atomic, write_json, write_text
from gradpursuit.pipeline import Run
from gradpursuit.pursuit import GradientTrajectoryPursuit, NonNegativeOMP
from gradpursuit.selection import Selection
from gradpursuit.selection_problem import load_problem

if TYPE_CHECKING:
    from run import Bench


def paper(bench: Bench) -> None:
    """Write `paper.*` into the results."""
    from run import collected, provenance

    if not collected(bench, bench.names(bench.plan["paper"]["targets"]), []):
        bench.fail("part paper: the gradients could not be collected (above)")
        return
    start, plan = time.monotonic(), bench.plan["paper"]
    run = Run(load_config(bench.config, [f"evaluation.seeds={plan['seeds']}"]))
    curves: list[dict[str, Any]] = []
    tops: list[dict[str, Any]] = []
    with run.lock:
        for name in bench.names(plan["targets"]):
            one = run.for_target(name)
            problem, candidates = load_problem(one)
            matrix, target = problem.matching()
            k = math.ceil(plan["fraction"] * len(one.table("pool")))
            steps, supports = _pursue(one, matrix, target, k)
            scored = _losses(
                one, name, {step["iteration"]: candidates[ids] for step, ids in zip(steps, supports, strict=True)}, k
            )
            curves += [
                {"target": name, "solver": "gtp", **step, **found} for step, found in zip(steps, scored, strict=True)
            ]
            curves += [{"target": name, "solver": "omp", **step} for step in _greedy(one, matrix, target, k)]
            similarity = np.asarray(matrix.correlate(target))
            tops += _top(one, name, "top-k", candidates[np.argsort(-similarity, kind="stable")[: plan["rows"]]])
            tops += _top(one, name, "gtp", candidates[supports[-1][: plan["rows"]]])
    write_text(bench.results / "paper.iterations.csv", _csv(curves))
    write_text(bench.results / "paper.top-rows.csv", _csv(tops))
    _plot(bench.results / "paper.png", curves)
    record = {"plan": plan, "seconds": round(time.monotonic() - start, 1), **provenance(bench)}
    write_json(bench.results / "paper.json", record)


def _pursue(run: Run, matrix: Any, target: Any, k: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Every accepted iteration with its support, rows of the largest weights first at the end."""
    settings, steps, supports = run.config.pursuit, [], []

    def told(step: Any, support: Any) -> None:
        steps.append(_step(step))
        supports.append(np.asarray(support))

    solver = GradientTrajectoryPursuit(
        k, alpha=settings.alpha, max_iter=settings.max_iter, tol=settings.tol, saturation="stop",
        max_coherence=settings.max_coherence,
    ).fit(matrix, target, callback=told)  # fmt: skip
    kept = [i for i, ids in enumerate(supports) if len(ids)]
    supports = [supports[i] for i in kept]
    supports[-1] = np.asarray(solver.support_)
    return [steps[i] for i in kept], supports


def _greedy(run: Run, matrix: Any, target: Any, k: int) -> list[dict[str, Any]]:
    return [_step(step) for step in NonNegativeOMP(k, alpha=run.config.pursuit.alpha).fit(matrix, target).steps_]


def _step(step: Any) -> dict[str, Any]:
    return {
        "iteration": int(step.iteration),
        "support": int(step.support_size),
        "relative_residual": float(step.relative_residual),
        "seconds": round(float(step.seconds), 4),
    }


def _losses(run: Run, name: str, supports: dict[int, Any], k: int) -> list[dict[str, Any]]:
    """Held-out loss and exact match after training on the support of every iteration, mean over seeds."""
    setting = comparison_setting(run, {name: run})
    arms = [Arm(f"gtp, iteration {i}", name, k, [Selection.ranked(ids)]) for i, ids in supports.items()]
    cells = Comparison(setting).run(arms, run.folder / "evaluation")
    found = []
    for arm in arms:
        own = [cell for cell in cells if cell.arm is arm]
        loss, match = (float(np.mean([getattr(cell, of) for cell in own])) for of in ("loss", "exact_match"))
        found.append({"heldout_loss": round(loss, 6), "exact_match": round(match, 4), "seeds": len(own)})
    return found


def _top(run: Run, name: str, how: str, indices: Any) -> list[dict[str, Any]]:
    """The first rows, and which of them repeat an earlier one."""
    pool, seen, rows = run.table("pool"), {}, []
    for rank, index in enumerate(np.asarray(indices).tolist(), 1):
        row = pool[index]
        root = row.columns.get("duplicate_of") or row.id
        rows.append(
            {
                "target": name,
                "chosen_by": how,
                "rank": rank,
                "id": row.id,
                "family": row.columns.get("family", ""),
                "repeats_rank": seen.get(root, ""),
                "prompt": row.columns["prompt"],
                "completion": row.columns["completion"],
            }
        )
        seen.setdefault(root, rank)
    return rows


def _csv(rows: list[dict[str, Any]]) -> str:
    text, names = io.StringIO(), list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _plot(path: Path, curves: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row["target"] for row in curves):
        for solver, line in (("gtp", "-o"), ("omp", ":")):
            rows = [row for row in curves if row["target"] == name and row["solver"] == solver]
            points = [[row[key] for row in rows] for key in ("iteration", "relative_residual")]
            left.plot(*points, line, markersize=3, label=f"{name}, {solver}")
        rows = [row for row in curves if row["target"] == name and "heldout_loss" in row]
        right.plot([r["iteration"] for r in rows], [r["heldout_loss"] for r in rows], "-o", markersize=3, label=name)
    left.set(xscale="symlog", xlabel="iteration", ylabel="relative residual")
    right.set(xlabel="iteration", ylabel="held-out loss after fine-tuning")
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    with write_atomic(path) as file:
        figure.savefig(file, format="png", dpi=150)
