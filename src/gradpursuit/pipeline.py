"""The run: stages in order, each from the files of the one above, none run twice without need."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradpursuit.config import RunConfig
from gradpursuit.errors import ConfigError, ModelError, RunError, SelectionError, StoreError, TrajectoryError
from gradpursuit.files import sha256_of, write_text
from gradpursuit.manifest import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gradpursuit.data import Table
    from gradpursuit.evaluation.table import Line
    from gradpursuit.selection import Selection, SelectionProblem, Strategy
    from gradpursuit.trajectory.checkpoint import Checkpoint
    from gradpursuit.trajectory.model import Compute

logger = logging.getLogger("gradpursuit")


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: of the stage.
        verb: of the command line that runs it.
        owns: folders and files of the run folder that are its alone; they are emptied before it starts anew.
        outputs: files that are there when it is complete.
        settings: sections, or single keys of sections, that it depends on beside the stage above.
        work: does it, and returns its findings for the manifest.
        keep: whether outputs of an unfinished or outdated attempt are left for `work` to go on with: "never",
            if they were made with the "same" inputs and settings, or "always" (they know what they belong to).
        intact: whether complete outputs can still be read; None: it is enough that they exist.
    """

    name: str
    verb: str
    owns: tuple[str, ...]
    outputs: tuple[str, ...]
    settings: tuple[str, ...]
    work: Callable[[Run], dict[str, Any]]
    keep: Literal["never", "same", "always"] = "never"
    intact: Callable[[Run], bool] | None = None


class Run:
    """A run folder and the configuration that fills it.

    Args:
        config: resolved; `run_dir` names the folder.
    """

    def __init__(self, config: RunConfig) -> None:
        if config.run_dir is None:
            raise ConfigError("'run_dir' is missing: name the folder of the run")
        self.config = config
        self.folder = Path(config.run_dir)
        self.manifest = Manifest(self.folder)

    def execute(self, upto: str, first: str | None = None) -> None:
        """Run the stages from `first` (default: the very first) to `upto`, skipping those that are complete.

        Raises:
            RunError: a stage before `first` is not complete.
            GradPursuitError: whatever a stage refuses; finished work is kept.
        """
        names = [stage.name for stage in STAGES]
        begin = names.index(first) if first else 0
        check(self.config)
        fingerprint = ""
        for number, stage in enumerate(STAGES[: names.index(upto) + 1]):
            fingerprint = self._fingerprint(stage, fingerprint)
            if self._is_complete(stage, fingerprint):
                if number >= begin:
                    logger.info("%s: complete, nothing to do", stage.name)
            elif number < begin:
                raise RunError(
                    f"{self.folder}: '{STAGES[begin].name}' needs '{stage.name}', which is not complete for this "
                    f"configuration; run `gradpursuit {stage.verb} {self.folder}` first"
                )
            else:
                self._run_stage(stage, fingerprint)

    def _is_complete(self, stage: Stage, fingerprint: str) -> bool:
        done = self.manifest.is_complete(stage.name, fingerprint, self._paths(stage.outputs))
        return done and (stage.intact is None or stage.intact(self))

    def _run_stage(self, stage: Stage, fingerprint: str) -> None:
        same = self.manifest.known(stage.name, fingerprint)
        if same is False:
            logger.warning("%s: settings or inputs have changed, it is made anew", stage.name)
        if stage.keep == "never" or (stage.keep == "same" and not same):
            for path in self._paths(stage.owns):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        write_text(self.folder / "config.yaml", self.config.dump())
        self.manifest.begin(stage.name, fingerprint, self.config.seed)
        start = time.monotonic()
        detail = self._work(stage)
        self.manifest.complete(stage.name, time.monotonic() - start, detail)

    def _work(self, stage: Stage) -> dict[str, Any]:
        import torch

        try:
            return stage.work(self)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ModelError(
                f"{stage.name}: out of memory on {self.compute.device}; lower gradients.tokens_per_batch, "
                "warmup.batch_size, evaluation.batch_size or data.max_tokens, and run again: finished work is kept"
            ) from error

    def _paths(self, templates: tuple[str, ...]) -> list[Path]:
        names = self.config.selection.strategies
        return [self.folder / template.format(strategy=name) for template in templates for name in names]

    def _fingerprint(self, stage: Stage, above: str) -> str:
        """sha256 over what the stage depends on: the stage above, settings, the seed, input files."""
        config = self.config.model_dump(mode="json")
        value: dict[str, Any] = {"above": above, "stage": stage.name, "seed": self.config.seed}
        for setting in stage.settings:
            section, _, key = setting.partition(".")
            value[setting] = config[section][key] if key else config[section]
        if stage.name == "data":
            from gradpursuit.trajectory.model import model_identity

            value["inputs"] = list(self._input_hashes.values())
            value["model"] = model_identity(self.config.model)
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _input_hashes(self) -> dict[str, str]:
        data = self.config.data
        return {path: sha256_of(Path(path)) for path in [*data.pool, *data.target, *data.heldout]}

    @cached_property
    def compute(self) -> Compute:
        """Device and precision."""
        from gradpursuit.trajectory.model import Compute

        made = Compute.of(self.config.model)
        logger.info("computing on %s", made)
        return made

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base model, loaded once."""
        from gradpursuit.trajectory.model import load_model

        return load_model(self.config.model).to(self.compute.device)  # type: ignore[arg-type]

    def table(self, name: str) -> Table:
        """The cleaned `pool`, `target` or `heldout`."""
        from gradpursuit.data import Table

        return Table.read(self.folder / "data" / f"{name}.parquet")

    def strategies(self) -> list[Strategy]:
        """The configured strategies."""
        from gradpursuit.selection import strategy

        return [strategy(name) for name in self.config.selection.strategies]

    def seed(self, use: str) -> int:
        """The seed for one use."""
        from gradpursuit.selection import derive_seed

        return derive_seed(self.config.seed, use)

    def budget(self, pool: Table) -> int:
        """k: as given, or the fraction of the pool rounded up, or 5 % of it.

        Raises:
            SelectionError: k is larger than the pool.
        """
        selection = self.config.selection
        k = selection.k or math.ceil((selection.fraction or 0.05) * len(pool))
        if k > len(pool):
            raise SelectionError(
                f"selection.k = {k}, but the cleaned pool has only {len(pool)} examples; choose a smaller k"
            )
        return k

    def selections(self) -> dict[str, list[Selection]]:
        """Every strategy's selection, one or more draws each."""
        from gradpursuit.selection.export import read_selection

        pool = self.table("pool")
        return {
            name: read_selection(self.folder / "selection" / name, pool) for name in self.config.selection.strategies
        }

    def lines(self) -> list[Line]:
        """The comparison table.

        Raises:
            RunError: the comparison has not been run.
        """
        from gradpursuit.evaluation.compare import read_cells
        from gradpursuit.evaluation.table import tabulate

        cells = read_cells(self.folder / "evaluation" / "results.jsonl")
        if not cells:
            raise RunError(f"{self.folder}: nothing has been compared yet; run `gradpursuit compare {self.folder}`")
        return tabulate(cells, self.selections(), self.table("pool"))


def check(config: RunConfig) -> None:
    """Refuse early what can be known before any work: strategies and the device.

    Raises:
        ConfigError: with the offending value.
    """
    from gradpursuit.selection import strategy
    from gradpursuit.trajectory.model import Compute

    for name in config.selection.strategies:
        strategy(name)
    Compute.of(config.model)


def _data(run: Run) -> dict[str, Any]:
    from gradpursuit.data import Renderer, prepare
    from gradpursuit.selection.export import refuse_reserved_columns
    from gradpursuit.trajectory.model import load_tokenizer

    config = run.config
    renderer = Renderer(load_tokenizer(config.model))
    counts = prepare(config.data, renderer, run.folder / "data", config.evaluation.holdout, run.seed("holdout"))
    pool = run.table("pool")
    refuse_reserved_columns(pool)
    return {**counts, "k": run.budget(pool), "inputs": run._input_hashes}


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


def _gradients(run: Run) -> dict[str, Any]:
    from gradpursuit.gradients.collector import Collector, CollectSpec
    from gradpursuit.trajectory.model import attach_lora

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
    model = attach_lora(run.base, config.model.lora, run.seed("adapter")).to(run.compute.device)
    try:
        collector = Collector(model, run.compute, checkpoints, spec)
        targets = list(dict.fromkeys(kind.for_target for kind in kinds))
        collector.collect("target", run.table("target"), targets, folder / "gradients" / "target")
        collector.collect("pool", run.table("pool"), kinds, folder / "gradients" / "pool")
    finally:
        model.unload()
    return {"features": [kind.label for kind in kinds]}


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
        reasons = ", ".join(selection.evidence.get("stop_reason", []))
        logger.warning("%s: chose %d of %d examples: %s", name, sum(sizes), k, reasons)


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


def _trajectory_intact(run: Run) -> bool:
    return _readable(lambda: read_run_trajectory(run))


def _gradients_intact(run: Run) -> bool:
    return _readable(lambda: load_problem(run))


def _readable(read: Callable[[], object]) -> bool:
    try:
        read()
    except (StoreError, TrajectoryError) as error:
        logger.warning("%s", error)
        return False
    return True


STAGES = (
    Stage(
        "data",
        "warmup",
        ("data",),
        ("data/pool.parquet", "data/target.parquet", "data/heldout.parquet", "data/dropped.jsonl"),
        ("data.max_tokens", "data.max_dropped", "evaluation.holdout"),
        _data,
    ),
    Stage(
        "trajectory",
        "warmup",
        ("trajectory",),
        ("trajectory/slice.json",),
        ("model", "warmup"),
        _trajectory,
        intact=_trajectory_intact,
    ),
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
    Stage(
        "selection",
        "select",
        ("selection",),
        ("selection/{strategy}/selection.parquet", "selection/{strategy}/path.json"),
        ("pursuit", "selection", "evaluation.seeds"),
        _selection,
    ),
    Stage("export", "export", (), ("selection/{strategy}/selected.jsonl",), (), _export),
    Stage(
        "evaluation",
        "compare",
        ("evaluation",),
        ("evaluation/results.jsonl", "evaluation/table.csv"),
        ("evaluation",),
        _evaluation,
        keep="same",
    ),
    Stage("report", "compare", (), ("report.html", "report.json"), (), _report),
)
