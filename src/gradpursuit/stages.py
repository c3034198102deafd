"""The stages of a run: what each does, in order, reading the files of the one above and writing its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gradpursuit.comparison_stage import COMPARISON_FILES, check_ahead, check_comparison, compare
from gradpursuit.config import DataSection
from gradpursuit.errors import DataError, SelectionError
from gradpursuit.export_stage import EXPORT_FILES, EXPORT_FOLDER, export
from gradpursuit.files import require_space
from gradpursuit.gradient_stage import (
    collect_gradients,
    gradient_folder,
    gradients_intact,
    gradients_plan,
    read_run_trajectory,
    splits,
    tuned_model,
)
from gradpursuit.remote import is_remote
from gradpursuit.selection_problem import choosable, opened_problem
from gradpursuit.spread import check_reach

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
        made: names of what it makes in its folders, as patterns; other files there are the user's.
        shows: which of its files and folders a summary names; empty: all.
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
    made: tuple[str, ...] = ("**/*",)
    shows: tuple[str, ...] = ()


def _data(run: Run) -> dict[str, Any]:
    from gradpursuit.data import prepare
    from gradpursuit.selection.subset import refuse_reserved_columns

    config = run.config
    counts = prepare(config.data, run.renderer(), run.folder / "data", config.evaluation.holdout, run.seed("holdout"))
    pool = run.table("pool")
    refuse_reserved_columns(pool)
    template = {"template": run.inputs.template} if run.inputs.template else {}
    return {**counts, **template, "k": run.budget(pool), "inputs": run.inputs.hashes, "stamps": run.inputs.stamps()}


def _check_inputs(run: Run) -> None:
    """The files to clean must be there, even if what was in them is known; and cluster and store, for what follows."""
    check_reach(run.config)
    if note := run.inputs.note("data"):
        raise DataError(
            f"{note.partition(';')[0]}, but the data must be cleaned again: put it back (or name its new place in "
            "data.pool, data.target, data.heldout), or go back to the settings that the data were cleaned with"
        )


def _check_trajectory(run: Run) -> None:
    """There must be a step for every checkpoint; a trajectory that was given, cluster and store must be there; and two
    short rows must have the gradients that each of them has alone."""
    from gradpursuit.gradients.dry import dry_pass, some_tokens
    from gradpursuit.trajectory.imported import checkpoint_folders
    from gradpursuit.trajectory.warmup import warmup_plan

    check_reach(run.config)
    check_ahead(run)
    if run.config.warmup.trajectory:
        checkpoint_folders(run.config.warmup.trajectory)
    else:
        warmup_plan(run.config.warmup, len(run.table("pool")), run.seed("warmup"))
    with tuned_model(run, run.seed("adapter")) as model:
        dry_pass(model, run.compute, some_tokens(run.table("pool")))


def _trajectory(run: Run) -> dict[str, Any]:
    from gradpursuit.trajectory.checkpoint import describe
    from gradpursuit.trajectory.imported import import_trajectory
    from gradpursuit.trajectory.warmup import warm_up

    settings, folder = run.config.warmup, run.folder / "trajectory"
    with tuned_model(run, run.seed("adapter")) as model:
        if settings.trajectory:
            needed = bool(_on_moments(run))
            checkpoints = import_trajectory(model, settings.trajectory, folder, need_moments=needed)
        else:
            checkpoints = warm_up(model, run.table("pool"), settings, run.compute, folder, run.seed("warmup"))
    given = {"given": settings.trajectory, "inputs": run.inputs.trajectory_hashes} if settings.trajectory else {}
    return {"checkpoints": [describe(checkpoint) for checkpoint in checkpoints], "compute": str(run.compute), **given}


def _on_moments(run: Run) -> list[str]:
    """Names of the configured strategies that go by gradients preconditioned with Adam's moments."""
    names = []
    for strategy in run.strategies():
        kinds = strategy.needs(run.settings).features
        if any(getattr(kind, "needs_moments", False) for kind in kinds):
            names.append(strategy.name)
    return names


def _check_collecting(run: Run) -> None:
    """The trajectory must have the moments that the strategies go by, and the disk room for the sketched gradients.

    An imported trajectory may be without moments, if no strategy needed them when it was imported.
    """
    from gradpursuit.store import StoreSpec
    from gradpursuit.trajectory.optimizer_files import NoMomentsError

    check_reach(run.config)
    checkpoints = read_run_trajectory(run)
    reasons = [checkpoint.no_moments for checkpoint in checkpoints if checkpoint.no_moments]
    if reasons and (names := _on_moments(run)):
        raise NoMomentsError(
            f"selection.strategies: {', '.join(names)} by Adam's moments, which the trajectory has not: {reasons[0]}"
        )
    settings, folder, needed = run.config.gradients, gradient_folder(run), 0
    if is_remote(folder):  # how much room there is cannot be asked
        return
    for split in splits(run):
        ids = tuple(split.table.ids)
        whole = StoreSpec(ids, len(checkpoints), settings.dim, settings.store_dtype, settings.shard_rows, {}).nbytes
        for kind in split.gradients:  # in place of what is there of it
            present = sum(path.stat().st_size for path in (split.folder / kind.label).rglob("*.safetensors"))
            needed += max(0, whole - present)
    require_space(folder, needed, "the gradient store")


def _check_budget(run: Run) -> None:
    """The rows that can be chosen must suffice; and the cluster be there."""
    check_reach(run.config)
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
            chosen = [selection.within(candidates) for selection in found]
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


def _report(run: Run) -> dict[str, Any]:
    from gradpursuit.report import write_report

    write_report(type(run)(run.config, quick=True))  # the stages above were checked a moment ago
    return {}


DATA = (
    *(
        f"data.{name}"
        for name in DataSection.model_fields
        if name not in ("pool", "target", "heldout", "chat_template")
    ),
    "evaluation.holdout",
)
EACH = "selection/{strategy}/"
STAGES = (
    Stage(
        "data",
        "warmup",
        ("data",),
        (),
        DATA,
        _data,
        check=_check_inputs,
    ),
    Stage("trajectory", "warmup", ("trajectory",), (), ("model", "warmup"), _trajectory, check=_check_trajectory),
    Stage(
        "gradients",
        "collect",
        ("gradients",),
        (),
        ("gradients",),
        collect_gradients,
        keep="always",
        intact=gradients_intact,
        check=_check_collecting,
        plan=gradients_plan,
        made=("dropped.jsonl", "*/*/manifest.json", "*/*/*/shard-*.safetensors"),
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
    Stage(
        "export",
        "export",
        (EACH + EXPORT_FOLDER,),
        tuple(EACH + name for name in EXPORT_FILES),
        (),
        export,
        shows=(EACH + EXPORT_FILES[0],),
    ),
    Stage(
        "evaluation",
        "compare",
        ("evaluation",),
        (),
        ("evaluation",),
        compare,
        keep="always",
        check=check_comparison,
        made=(*COMPARISON_FILES, "selections/*/*/*"),
    ),
    Stage("report", "report", (), ("report.html", "report.json"), (), _report),
)
