"""The stages of a run: what each does, in order, reading the files of the one above and writing its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from gradpursuit.counting import finished_rows
from gradpursuit.errors import SelectionError, StoreError, TrajectoryError

if TYPE_CHECKING:
    from pathlib import Path

    from gradpursuit.data import Table
    from gradpursuit.gradients.preconditioner import Preconditioner
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
        intact: whether complete outputs are still what they were (told to be quick, by name and size); None: their
            sha256 is compared.
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


def _trajectory(run: Run) -> dict[str, Any]:
    from gradpursuit.trajectory.checkpoint import describe
    from gradpursuit.trajectory.model import attach_lora
    from gradpursuit.trajectory.warmup import warm_up

    model = attach_lora(run.base, run.config.model.lora, run.seed("adapter")).to(run.compute.device)
    try:
        checkpoints = warm_up(
            model, run.table("pool"), run.config.warmup, run.compute, run.folder / "trajectory", run.seed("warmup")
        )
    finally:
        model.unload()
    return {"checkpoints": [describe(checkpoint) for checkpoint in checkpoints], "compute": str(run.compute)}


@dataclass(frozen=True)
class Split:
    """Rows whose features are wanted, with which preconditioners, and the folder that gets one store for each."""

    name: str
    table: Table
    kinds: Sequence[Preconditioner]
    folder: Path


def wanted_features(run: Run) -> dict[str, list[Preconditioner]]:
    """The preconditioners that the configured strategies need, of the `target` and of the `pool`."""
    kinds = list(dict.fromkeys(k for strategy in run.strategies() for k in strategy.needs(run.config.gradients)))
    return {"target": list(dict.fromkeys(kind.for_target for kind in kinds)), "pool": kinds}


def _gradients(run: Run) -> dict[str, Any]:
    wanted, folder = wanted_features(run), run.folder / "gradients"
    collect(run, [Split(name, run.table(name), kinds, folder / name) for name, kinds in wanted.items()])
    return {"features": [kind.label for kind in wanted["pool"]]}


def _plan_gradients(run: Run) -> dict[str, Any]:
    return {name: [kind.label for kind in kinds] for name, kinds in wanted_features(run).items()}


def collect(run: Run, splits: Sequence[Split]) -> None:
    """Compute the features of `splits`, one after the other, along the trajectory of a run."""
    from gradpursuit.gradients.collector import Collector, CollectSpec
    from gradpursuit.trajectory.model import attach_lora

    config, checkpoints = run.config, read_run_trajectory(run)
    if not any(split.kinds for split in splits):
        return
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
    model = attach_lora(run.base, config.model.lora, run.seed("adapter")).to(run.compute.device)
    try:
        collector = Collector(model, run.compute, checkpoints, spec)
        for split in splits:
            collector.collect(split.name, split.table, split.kinds, split.folder)
    finally:
        model.unload()


def read_run_trajectory(run: Run) -> list[Checkpoint]:
    """The checkpoints of a run, as many as it is configured to have.

    Raises:
        TrajectoryError: one is missing or broken.
    """
    from gradpursuit.trajectory.checkpoint import read_trajectory

    folder, wanted = run.folder / "trajectory", run.config.warmup.checkpoints
    found = read_trajectory(folder)
    if len(found) != wanted:
        raise TrajectoryError(f"{folder}: holds {len(found)} of {wanted} checkpoints; run the warm-up again")
    return found


def load_problem(run: Run) -> SelectionProblem:
    """The selection problem of a run whose gradients are collected, for the target that is chosen for.

    Its pool is `run.candidates()`: all rows, but those that repeat a row of a target added later.

    Raises:
        StoreError: a store is incomplete or damaged.
    """
    import numpy as np

    from gradpursuit.selection import SelectionProblem
    from gradpursuit.selection.features import TrajectoryFeatures
    from gradpursuit.store import GradientStore

    def features(folder: Path, kinds: Sequence[Preconditioner]) -> dict[str, TrajectoryFeatures]:
        return {kind.label: TrajectoryFeatures(GradientStore.open(folder / kind.label).features()) for kind in kinds}

    wanted, candidates = wanted_features(run), run.candidates()
    ids = run.table("pool").ids
    pool = features(run.folder / "gradients" / "pool", wanted["pool"])
    sources = [row.source for row in run.target_table("target")]
    return SelectionProblem(
        ids=[ids[i] for i in candidates.tolist()],
        pool={label: found.take(candidates) for label, found in pool.items()},
        target=features(run.target_folder / "gradients" / "target", wanted["target"]),
        groups=np.unique(sources, return_inverse=True)[1].astype(np.int64),
        rates=np.array([c.learning_rate for c in read_run_trajectory(run)]),
        gradients=run.config.gradients,
        pursuit=run.config.pursuit,
    )


def _selection(run: Run) -> dict[str, Any]:
    from gradpursuit.selection.export import write_selection

    pool, candidates, problem = run.table("pool"), run.candidates(), load_problem(run)
    k, seconds = run.budget(pool), {}
    if k > len(candidates):
        raise SelectionError(
            f"selection.k = {k}, but only {len(candidates)} of the {len(pool)} examples of the pool can be chosen for "
            f"target '{run.config.selection.target}': the others repeat its rows; choose a smaller k"
        )
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


def _evaluation(run: Run) -> dict[str, Any]:
    from gradpursuit.evaluation.compare import Comparison
    from gradpursuit.evaluation.table import write_csv

    pool = run.table("pool")
    comparison = Comparison(
        run.base,
        run.config.model.lora,
        run.compute,
        pool,
        run.target_table("heldout"),
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


def gradient_rows(run: Run) -> dict[str, tuple[int, int]]:
    """Rows × checkpoints of `target` and `pool` that the stage was begun for: finished, and in all. Loads no model."""
    rows, plan = run.manifest.entry("data").get("detail", {}).get("rows"), run.manifest.entry("gradients").get("plan")
    if not rows or not plan:
        return {}
    settings = run.config.gradients
    made_with = {
        "trajectory": run.manifest.entry("trajectory").get("fingerprint"),
        "dim": settings.dim,
        "dtype": settings.store_dtype,
        "shard_rows": settings.shard_rows,
    }
    return {
        name: (
            finished_rows(run.folder / "gradients" / name, labels, made_with),
            rows[name] * run.config.warmup.checkpoints,
        )
        for name, labels in plan.items()
        if labels
    }


def _gradients_intact(run: Run, quick: bool) -> bool:
    """Whether every shard of pool and target is there and unchanged; each that is not is named."""
    if quick:
        return all(done == total for done, total in gradient_rows(run).values())
    from gradpursuit.store import GradientStore

    intact = True
    for name, kinds in wanted_features(run).items():
        for kind in kinds:
            try:
                store = GradientStore.open(run.folder / "gradients" / name / kind.label)
            except StoreError as error:
                logger.warning("%s", error)
                intact = False
                continue
            for checkpoint in range(store.spec.checkpoints):
                for shard in range(len(store.spec.shards())):
                    try:
                        store.read(checkpoint, shard, verify=True)
                    except StoreError as error:
                        logger.warning("%s", error)
                        intact = False
    return intact


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
        plan=_plan_gradients,
    ),
    Stage("selection", "select", ("selection",), (), ("pursuit", "selection", "evaluation.seeds"), _selection),
    Stage("export", "export", (), (EACH,), (), _export),
    Stage("evaluation", "compare", ("evaluation",), (), ("evaluation",), _evaluation, keep="unfinished"),
    Stage("report", "compare", (), ("report.html", "report.json"), (), _report),
)
