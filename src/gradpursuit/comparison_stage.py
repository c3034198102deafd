"""The comparison of a run: which subsets it wants, for which targets, and what is trained and scored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpursuit.config import OWN, rows_of
from gradpursuit.errors import SelectionError
from gradpursuit.gradient_stage import tuned_model
from gradpursuit.manifest import SELECTION_FORMAT, digest_of
from gradpursuit.sealed import harm
from gradpursuit.selection_problem import choosable, opened_problem

if TYPE_CHECKING:
    from gradpursuit.evaluation.compare import Arm, Setting
    from gradpursuit.evaluation.scoring import Scorer
    from gradpursuit.pipeline import Run
    from gradpursuit.selection import Selection

logger = logging.getLogger("gradpursuit")
COMPARISON_FILES = (
    "results.jsonl",
    "plan.json",
    "table.csv",
    "differences.csv",
    "table.md",
    "summary.json",
    "gain.png",
)


def compare(run: Run) -> dict[str, Any]:
    """The stage: `evaluation/` with results.jsonl, table.csv, differences.csv, table.md, summary.json, gain.png."""
    from gradpursuit.evaluation.compare import Comparison
    from gradpursuit.evaluation.findings import Findings
    from gradpursuit.evaluation.plot import plot_gains
    from gradpursuit.evaluation.table import to_json, write_tables
    from gradpursuit.files import write_json

    folder, runs = run.folder / "evaluation", target_runs(run)
    setting = comparison_setting(run, runs)
    exported = {run.budget(setting.pool): run.selections()}
    made: list[Arm] = []
    for name, one in runs.items():
        known = exported if one.config.selection == run.config.selection else {}
        made += arms(one, name, folder / "selections", known)
    cells = Comparison(setting).run(made, folder)
    findings = Findings(cells, setting.pool, compared(run)[0])
    write_tables(folder, findings)
    write_json(folder / "summary.json", to_json(findings.lines()))
    plot_gains(folder / "gain.png", findings)
    return {"targets": list(runs), "budgets": budgets(run), "cells": len(cells)}


def comparison_setting(run: Run, runs: Mapping[str, Run]) -> Setting:
    """What all cells of a comparison of the run share; `runs` looks at it for each of the targets."""
    from gradpursuit.evaluation.compare import Setting

    return Setting(
        tuned=partial(tuned_model, run),
        compute=run.compute,
        scorer=_scorer(run),
        pool=run.table("pool"),
        heldout={name: one.target_table("heldout") for name, one in runs.items()},
        config=run.config.evaluation,
        seed=run.config.seed,
        origin=_origin(run),
    )


def compared(run: Run) -> list[str]:
    """The strategies that are compared, the reference first."""
    return run.config.evaluation.strategies or run.config.selection.strategies


def target_names(run: Run) -> list[str]:
    """The targets that are chosen for and scored on, `own` for that of data.target."""
    return run.config.evaluation.targets or [run.config.selection.target or OWN]


def target_runs(run: Run) -> dict[str, Run]:
    """The run, looked at for each of the targets."""
    return {name: run.for_target(None if name == OWN else name) for name in target_names(run)}


def targets_fingerprint(run: Run) -> dict[str, str]:
    """What the comparison depends on of targets that were added.

    Raises:
        RunError: one is not there or not complete; the command that makes it is named.
    """
    return {name: one.target.fingerprint() for name, one in target_runs(run).items() if one.target}


def budgets(run: Run) -> list[int]:
    """k of every budget, ascending; shares of the cleaned pool are rounded up."""
    pool, wanted = run.table("pool"), run.config.evaluation.budgets
    found = [rows_of(budget, len(pool)) for budget in wanted]
    return sorted(set(found)) or [run.budget(pool)]


def check_comparison(run: Run) -> None:
    """Refuse, before anything is trained, what could not be compared.

    Raises:
        SelectionError: a budget is larger than what can be chosen.
        ConfigError, DataError: accuracy was asked for, but cannot be measured.
    """
    from gradpursuit.evaluation.choices import check_choices
    from gradpursuit.trajectory.model import load_tokenizer

    largest = max(budgets(run))
    for name, one in target_runs(run).items():
        count = len(choosable(one))
        if largest > count:
            raise SelectionError(
                f"evaluation.budgets: {largest} examples, but only {count} of the pool can be chosen for target "
                f"'{name}'; leave the larger budgets out"
            )
        if run.config.evaluation.accuracy:
            check_choices(one.target_table("heldout"), load_tokenizer(run.config.model), f"target '{name}'")


def check_ahead(run: Run) -> None:
    """Refuse, before the warm-up, what could not be compared hours later, as far as the cleaned data tell.

    Raises:
        SelectionError: a budget is larger than the pool.
        ConfigError, DataError: accuracy was asked for, but cannot be measured.
    """
    from gradpursuit.evaluation.choices import check_choices
    from gradpursuit.trajectory.model import load_tokenizer

    largest, count = max(budgets(run)), len(run.table("pool"))
    if largest > count:
        raise SelectionError(
            f"evaluation.budgets: {largest} examples, but the cleaned pool has only {count}; leave larger budgets out"
        )
    if run.config.evaluation.accuracy and OWN in target_names(run):
        check_choices(run.table("heldout"), load_tokenizer(run.config.model), f"target '{OWN}'")


Subsets = dict[str, list["Selection"]]  # the draws of every strategy


def arms(run: Run, name: str, folder: Path, known: Mapping[int, Subsets]) -> Iterator[Arm]:
    """The base model, every strategy's subset of every budget, and the full pool, for the target of `run`.

    Args:
        run: looked at for the target.
        name: of the target.
        folder: keeps the subsets that are made here.
        known: those of budgets that the selection has made already.
    """
    from gradpursuit.evaluation.compare import BASE, FULL, Arm
    from gradpursuit.selection import Selection

    endpoints = run.config.evaluation.endpoints
    if BASE in endpoints:
        yield Arm(BASE, name, 0, [])
    wanted = budgets(run)
    found = {**known, **_subsets(run, [k for k in wanted if k not in known], folder / name)}
    for k in wanted:
        yield from (Arm(strategy, name, k, found[k][strategy]) for strategy in compared(run))
    if FULL in endpoints:
        yield Arm(FULL, name, 0, [Selection.ranked(run.candidates())])


def _subsets(run: Run, wanted: Sequence[int], folder: Path) -> dict[int, Subsets]:
    """Every strategy's subsets of the `wanted` k; what was made before is read, the rest is made and kept in `folder`.

    The problem is opened once: what strategies make of it serves all budgets.
    """
    from gradpursuit.selection.export import read_selection, selection_damage, write_selection

    pool, strategies = run.table("pool"), {one.name: one for one in run.strategies() if one.name in compared(run)}
    places = {(k, n): folder / f"{n}-{k}-{_fingerprint(run, n, k)[:12]}" for k in wanted for n in strategies}
    damaged = {cell: selection_damage(place) for cell, place in places.items() if place.exists()}
    for path in filter(None, damaged.values()):
        logger.warning("%s: %s; this selection is made again", path, harm(path, "was written"))
    if lacking := [cell for cell in places if damaged.get(cell, places[cell])]:
        with opened_problem(run) as (problem, candidates):
            for k, name in lacking:
                draws = range(run.config.evaluation.seeds if strategies[name].stochastic else 1)
                made = [strategies[name].select(problem, k, run.seed(f"{name}-{draw}")) for draw in draws]
                write_selection(places[k, name], [one.within(candidates) for one in made], pool)
                logger.info("%s: %d of %d examples chosen for %s", name, len(made[0].indices), k, folder.name)
    return {k: {name: read_selection(places[k, name], pool) for name in strategies} for k in wanted}


def _fingerprint(run: Run, strategy: str, k: int) -> str:
    """What a subset depends on."""
    budget_or_place = {"strategies", "k", "fraction", "target"}
    return digest_of(
        {
            "selection": run.config.selection.model_dump(mode="json", exclude=budget_or_place),
            "gradients": run.manifest.fingerprint("gradients"),
            "target": run.target.fingerprint() if run.target else None,
            "pursuit": run.config.pursuit.model_dump(mode="json"),
            "draws": run.config.evaluation.seeds,
            "format": SELECTION_FORMAT,
            "strategy": strategy,
            "k": k,
        }
    )


def _scorer(run: Run) -> Scorer:
    from gradpursuit.evaluation.scoring import Scorer
    from gradpursuit.trajectory.model import load_tokenizer

    return Scorer(run.compute, load_tokenizer(run.config.model), accuracy=run.config.evaluation.accuracy)


def _origin(run: Run) -> dict[str, Any]:
    """What tells the model and its fresh adapter from others."""
    model = run.config.model.model_dump(mode="json")
    return {
        "model": run.model_identity,
        "adapter": {name: model[name] for name in ("lora", "layers")},
        "trajectory": run.inputs.trajectory_hashes if run.config.warmup.trajectory else None,
    }
