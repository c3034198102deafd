"""The stages of a run: what each does, in order, reading the files of the one above and writing its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from gradpursuit.errors import StoreError, TrajectoryError

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run
    from gradpursuit.selection import Selection, SelectionProblem
    from gradpursuit.trajectory.checkpoint import Checkpoint

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
        intact: whether complete outputs are still what they were; None: their sha256 is compared.
    """

    name: str
    verb: str
    owns: tuple[str, ...]
    writes: tuple[str, ...]
    settings: tuple[str, ...]
    work: Callable[[Run], dict[str, Any]]
    keep: Literal["never", "unfinished", "always"] = "never"
    intact: Callable[[Run], bool] | None = None


def _data(run: Run) -> dict[str, Any]:
    from gradpursuit.data import Renderer, prepare
    from gradpursuit.selection.export import refuse_reserved_columns
    from gradpursuit.trajectory.model import load_tokenizer

    config = run.config
    renderer = Renderer(load_tokenizer(config.model))
    counts = prepare(config.data, renderer, run.folder / "data", config.evaluation.holdout, run.seed("holdout"))
    pool = run.table("pool")
    refuse_reserved_columns(pool)
    return {**counts, "k": run.budget(pool), "inputs": run.input_hashes}


def _trajectory(run: Run) -> dict[str, Any]:
    from gradpursuit.trajectory.checkpoint import describe
    from gradpursuit.trajectory.imported import import_trajectory
    from gradpursuit.trajectory.warmup import warm_up

    settings, folder = run.config.warmup, run.folder / "trajectory"
    with tuned_model(run, run.seed("adapter")) as model:
        if settings.trajectory:
            kinds = {kind.name for strategy in run.strategies() for kind in strategy.needs(run.config.gradients)}
            checkpoints = import_trajectory(model, settings.trajectory, folder, need_moments=bool(kinds - {"identity"}))
        else:
            checkpoints = warm_up(model, run.table("pool"), settings, run.compute, folder, run.seed("warmup"))
    return {"checkpoints": [describe(checkpoint) for checkpoint in checkpoints], "compute": str(run.compute)}


def tuned_model(run: Run, seed: int) -> AbstractContextManager[Any]:
    """The base model with what is trained of it, fresh from `seed`: of the kind that the run's trajectory has."""
    from gradpursuit.trajectory.imported import checkpoint_folders
    from gradpursuit.trajectory.tuning import tuned

    paths = run.config.warmup.trajectory
    return tuned(run.base, run.config.model, seed, checkpoint_folders(paths)[0] if paths else None)


def _gradients(run: Run) -> dict[str, Any]:
    from gradpursuit.gradients.collector import Collector, CollectSpec

    config, folder = run.config, run.folder
    kinds = list(dict.fromkeys(kind for strategy in run.strategies() for kind in strategy.needs(config.gradients)))
    checkpoints = read_run_trajectory(run)
    if not kinds:
        return {"features": []}
    settings = config.gradients
    spec = CollectSpec(
        dim=settings.dim,
        nonzeros=settings.nonzeros,
        sketch_seed=run.seed("sketch"),
        tokens_per_batch=settings.tokens_per_batch,
        dtype=settings.store_dtype,
        shard_rows=settings.shard_rows,
        origin={"trajectory": run.manifest.fingerprint("trajectory")},
    )
    with tuned_model(run, run.seed("adapter")) as model:
        collector = Collector(model, run.compute, checkpoints, spec)
        targets = list(dict.fromkeys(kind.for_target for kind in kinds))
        collector.collect("target", run.table("target"), targets, folder / "gradients" / "target")
        collector.collect("pool", run.table("pool"), kinds, folder / "gradients" / "pool")
    return {"features": [kind.label for kind in kinds]}


def read_run_trajectory(run: Run) -> list[Checkpoint]:
    """The checkpoints of a run, as many as it is configured to have.

    Raises:
        TrajectoryError: one is missing or broken.
    """
    from gradpursuit.trajectory.checkpoint import read_trajectory
    from gradpursuit.trajectory.imported import checkpoint_folders

    folder, settings = run.folder / "trajectory", run.config.warmup
    wanted = len(checkpoint_folders(settings.trajectory)) if settings.trajectory else settings.checkpoints
    found = read_trajectory(folder)
    if len(found) != wanted:
        raise TrajectoryError(f"{folder}: holds {len(found)} of {wanted} checkpoints; run the warm-up again")
    return found


def load_problem(run: Run) -> SelectionProblem:
    """The selection problem of a run whose gradients are collected.

    Raises:
        StoreError: a store is incomplete or damaged.
    """
    import numpy as np

    from gradpursuit.selection import SelectionProblem
    from gradpursuit.selection.features import TrajectoryFeatures
    from gradpursuit.store import GradientStore

    config = run.config
    kinds = {kind for strategy in run.strategies() for kind in strategy.needs(config.gradients)}

    def features(split: str, labels: set[str]) -> dict[str, TrajectoryFeatures]:
        folder = run.folder / "gradients" / split
        return {name: TrajectoryFeatures(GradientStore.open(folder / name).features()) for name in labels}

    sources = [row.source for row in run.table("target")]
    return SelectionProblem(
        ids=run.table("pool").ids,
        pool=features("pool", {kind.label for kind in kinds}),
        target=features("target", {kind.for_target.label for kind in kinds}),
        groups=np.unique(sources, return_inverse=True)[1].astype(np.int64),
        rates=np.array([c.learning_rate for c in read_run_trajectory(run)]),
        gradients=config.gradients,
        pursuit=config.pursuit,
    )


def _selection(run: Run) -> dict[str, Any]:
    from gradpursuit.selection.export import write_selection

    pool, problem = run.table("pool"), load_problem(run)
    k, seconds = run.budget(pool), {}
    for strategy in run.strategies():
        start = time.monotonic()
        draws = range(run.config.evaluation.seeds if strategy.stochastic else 1)
        chosen = [strategy.select(problem, k, run.seed(f"{strategy.name}-{draw}")) for draw in draws]
        seconds[strategy.name] = round(time.monotonic() - start, 3)
        write_selection(run.folder / "selection" / strategy.name, chosen, pool)
        logger.info("%s: %d examples in %.2f s", strategy.name, len(chosen[0].indices), seconds[strategy.name])
        _tell_saturation(strategy.name, chosen[0], k)
    return {"k": k, "seconds": seconds}


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


def _evaluation(run: Run) -> dict[str, Any]:
    from gradpursuit.evaluation.compare import Comparison
    from gradpursuit.evaluation.table import write_csv

    pool = run.table("pool")
    comparison = Comparison(
        partial(tuned_model, run),
        run.compute,
        pool,
        run.table("heldout"),
        run.config.evaluation,
        run.config.seed,
    )
    folder = run.folder / "evaluation"
    comparison.run(run.selections(), run.budget(pool), folder / "results.jsonl")
    write_csv(folder / "table.csv", run.lines())
    return {}


def _report(run: Run) -> dict[str, Any]:
    from gradpursuit.report import write_report

    write_report(run.folder, run.config, run.manifest.read(), run.lines(), run.selections(), run.table("pool"))
    return {}


def _gradients_intact(run: Run) -> bool:
    try:
        load_problem(run)
    except (StoreError, TrajectoryError) as error:
        logger.warning("%s", error)
        return False
    return True


EACH = "selection/{strategy}/selected.jsonl"
STAGES = (
    Stage("data", "warmup", ("data",), (), ("data.max_tokens", "data.max_dropped", "evaluation.holdout"), _data),
    Stage("trajectory", "warmup", ("trajectory",), (), ("model", "warmup"), _trajectory),
    Stage(
        "gradients",
        "collect",
        ("gradients",),
        (),
        ("gradients", "selection.strategies"),
        _gradients,
        keep="always",
        intact=_gradients_intact,
    ),
    Stage("selection", "select", ("selection",), (), ("pursuit", "selection", "evaluation.seeds"), _selection),
    Stage("export", "export", (), (EACH,), (), _export),
    Stage("evaluation", "compare", ("evaluation",), (), ("evaluation",), _evaluation, keep="unfinished"),
    Stage("report", "compare", (), ("report.html", "report.json"), (), _report),
)
