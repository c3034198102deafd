"""The stages of a run: what each does, in order, reading the files of the one above and writing its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from gradpursuit.comparison_stage import check_comparison, compare
from gradpursuit.errors import DataError, SelectionError
from gradpursuit.files import gone_note
from gradpursuit.gradient_stage import (
    collect_gradients,
    gradients_intact,
    gradients_plan,
    tuned_model,
    wanted_features,
)
from gradpursuit.selection_problem import choosable, opened_problem

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run
    from gradpursuit.selection import Selection

logger = logging.getLogger("gradpursuit")


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: of the stage.
        verb: of the command line that runs it.
        owns: folders of the run folder that are its alone; they are emptied before it starts anew.
        writes: files elsewhere in the run folder.
        settings: sections, or single keys of sections, that it depends on beside the stage above.
        work: does it, and returns its findings for the manifest.
        keep: which outputs are left for `work` to go on with: "never" any, those of an "unfinished" attempt with
            the same inputs and settings, or "always" (they know what they belong to).
        intact: whether complete outputs are still what they were (told to be quick, by name and size); None: their
            sha256 is compared.
        check: refuses, before anything is changed, what it could not do.
        plan: what it is going to write, for whoever looks on from outside.
    """

    name: str
    verb: str
    owns: tuple[str, ...]
    writes: tuple[str, ...]
    settings: tuple[str, ...]
    work: Callable[[Run], dict[str, Any]]
    keep: Literal["never", "unfinished", "always"] = "never"
    intact: Callable[[Run, bool], bool] | None = None
    check: Callable[[Run], None] | None = None
    plan: Callable[[Run], dict[str, Any]] | None = None


def _data(run: Run) -> dict[str, Any]:
    from gradpursuit.data import Renderer, prepare
    from gradpursuit.selection.export import refuse_reserved_columns
    from gradpursuit.trajectory.model import load_tokenizer

    config = run.config
    renderer = Renderer(load_tokenizer(config.model))
    counts = prepare(config.data, renderer, run.folder / "data", config.evaluation.holdout, run.seed("holdout"))
    pool = run.table("pool")
    refuse_reserved_columns(pool)
    return {**counts, "k": run.budget(pool), "inputs": run.input_hashes, "stamps": run.input_stamps()}


def _check_inputs(run: Run) -> None:
    """The files to clean must be there, even if it is known what was in them."""
    if note := gone_note(run.input_hashes):
        raise DataError(
            f"{note.partition(';')[0]}, but the data must be cleaned anew: put it back (or name its new place in "
            "data.pool, data.target, data.heldout), or go back to the settings that the data were cleaned with"
        )


def _check_steps(run: Run) -> None:
    """The warm-up must have a step for every checkpoint."""
    from gradpursuit.trajectory.warmup import warmup_plan

    if not run.config.warmup.trajectory:
        warmup_plan(run.config.warmup, len(run.table("pool")), run.seed("warmup"))


def _trajectory(run: Run) -> dict[str, Any]:
    from gradpursuit.trajectory.checkpoint import describe
    from gradpursuit.trajectory.imported import import_trajectory
    from gradpursuit.trajectory.warmup import warm_up

    settings, folder = run.config.warmup, run.folder / "trajectory"
    with tuned_model(run, run.seed("adapter")) as model:
        if settings.trajectory:
            kinds = {kind.label for kinds in wanted_features(run).values() for kind in kinds}
            moments = bool(kinds - {"identity", "embedding", "el2n"})
            checkpoints = import_trajectory(model, settings.trajectory, folder, need_moments=moments)
        else:
            checkpoints = warm_up(model, run.table("pool"), settings, run.compute, folder, run.seed("warmup"))
    return {"checkpoints": [describe(checkpoint) for checkpoint in checkpoints], "compute": str(run.compute)}


def _check_budget(run: Run) -> None:
    """The rows that can be chosen must suffice."""
    pool, candidates = run.table("pool"), choosable(run)
    k = run.budget(pool)
    if k > len(candidates):
        raise SelectionError(
            f"selection.k = {k}, but only {len(candidates)} of the {len(pool)} examples of the pool can be chosen for "
            f"target '{run.config.selection.target or 'target'}': the others repeat its rows or have no gradient; "
            "choose a smaller k"
        )


def _selection(run: Run) -> dict[str, Any]:
    from gradpursuit.selection.export import write_selection

    pool, seconds = run.table("pool"), {}
    k = run.budget(pool)
    with opened_problem(run) as (problem, candidates):
        for strategy in run.strategies():
            start = time.monotonic()
            draws = range(run.config.evaluation.seeds if strategy.stochastic else 1)
            found = [strategy.select(problem, k, run.seed(f"{strategy.name}-{draw}")) for draw in draws]
            chosen = [replace(selection, indices=candidates[selection.indices]) for selection in found]
            seconds[strategy.name] = round(time.monotonic() - start, 3)
            write_selection(run.folder / "selection" / strategy.name, chosen, pool)
            logger.info("%s: %d examples in %.2f s", strategy.name, len(chosen[0].indices), seconds[strategy.name])
            _tell_saturation(strategy.name, chosen[0], k)
    rows = {"pool": len(candidates), **{name: len(run.target_table(name)) for name in ("target", "heldout")}}
    return {"k": k, "target": run.config.selection.target, "rows": rows, "seconds": seconds}


def _tell_saturation(name: str, selection: Selection, k: int) -> None:
    """Say what a pursuit could not do in one go: fill the budget, or fill it in one layer."""
    sizes = [int((selection.layers == layer).sum()) for layer in range(1, int(selection.layers.max()) + 1)]
    if len(sizes) > 1:
        logger.warning(
            "%s: saturated at %d examples; layers of %s examples match the target one after the other",
            name,
            sizes[0],
            ", ".join(map(str, sizes)),
        )
    if sum(sizes) < k:
        reasons = ", ".join(dict.fromkeys(selection.evidence.get("stop_reason", [])))
        copies = len(selection.evidence.get("copies", {}))
        logger.warning(
            "%s: chose %d of %d examples: %s; %d copies were set aside (pursuit.max_coherence)",
            name,
            sum(sizes),
            k,
            reasons,
            copies,
        )


def _export(run: Run) -> dict[str, Any]:
    from gradpursuit.selection.export import export_jsonl

    pool = run.table("pool")
    for name, draws in run.selections().items():
        export_jsonl(run.folder / "selection" / name / "selected.jsonl", draws[0], pool)
    return {}


def _report(run: Run) -> dict[str, Any]:
    from gradpursuit.report import write_report

    write_report(type(run)(run.config, quick=True))  # the stages above were checked a moment ago
    return {}


EACH = "selection/{strategy}/selected.jsonl"
STAGES = (
    Stage(
        "data",
        "warmup",
        ("data",),
        (),
        ("data.max_tokens", "data.max_dropped", "evaluation.holdout"),
        _data,
        check=_check_inputs,
    ),
    Stage("trajectory", "warmup", ("trajectory",), (), ("model", "warmup"), _trajectory, check=_check_steps),
    Stage(
        "gradients",
        "collect",
        ("gradients",),
        (),
        ("gradients",),
        collect_gradients,
        keep="always",
        intact=gradients_intact,
        plan=gradients_plan,
    ),
    Stage(
        "selection",
        "select",
        ("selection",),
        (),
        ("pursuit", "selection", "evaluation.seeds"),
        _selection,
        check=_check_budget,
    ),
    Stage("export", "export", (), (EACH,), (), _export),
    Stage(
        "evaluation", "compare", ("evaluation",), (), ("evaluation",), compare, keep="always", check=check_comparison
    ),
    Stage("report", "compare", (), ("report.html", "report.json"), (), _report),
)
