"""What a run will cost, measured on up to 128 of its own rows before anything is spent."""

from __future__ import annotations

import logging
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from gradpursuit.comparison_stage import compared, target_names
from gradpursuit.config import RunConfig
from gradpursuit.data import Row, Table, draw, prepare
from gradpursuit.evaluation.scoring import Scorer
from gradpursuit.gradient_stage import Split, checkpoint_count, tuned_model, wanted_features
from gradpursuit.gradients.collector import Collector, SignalCollector
from gradpursuit.gradients.dry import dry_pass, some_tokens
from gradpursuit.gradients.filling import CollectSpec, StoreFiller
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.pipeline import Run, check
from gradpursuit.store import StoreSpec
from gradpursuit.trajectory.checkpoint import AdamState
from gradpursuit.trajectory.loss import padded_width, token_batches
from gradpursuit.trajectory.model import load_tokenizer, trainable
from gradpursuit.trajectory.training import TrainSpec, train
from gradpursuit.trajectory.warmup import warmup_plan

logger = logging.getLogger("gradpursuit")
SAMPLE = 1024  # pool rows that are read and rendered
_STEPS, _ROWS = 4, 128  # training steps, and rows whose gradients are collected, that are timed


@dataclass(frozen=True)
class Cost:
    """Of one stage: `seconds`, and `disk` in bytes that it leaves behind."""

    seconds: float
    disk: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Of both together."""
        return Cost(self.seconds + other.seconds, self.disk + other.disk)


@dataclass(frozen=True)
class Estimate:
    """What a run will cost.

    Attributes:
        stages: cost of every stage, in order.
        full_training: seconds of fine-tuning once on the whole pool, with the epochs of the evaluation.
        memory: peak resident bytes of the host while it was measured.
        gpu_memory: peak bytes on the GPU, or None.
        rows: of pool and target after cleaning (of a sample: extrapolated).
        compute: device and precision.
    """

    stages: dict[str, Cost]
    full_training: float
    memory: int
    gpu_memory: int | None
    rows: dict[str, int]
    compute: str

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(cost.seconds for cost in self.stages.values())

    @property
    def disk(self) -> int:
        """Bytes that all stages leave behind."""
        return sum(cost.disk for cost in self.stages.values())

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "seconds": self.seconds, "disk": self.disk}


@dataclass(frozen=True)
class Sample:
    """Cleaned rows to measure with; `scale` is how many rows of the pool each of its rows stands for."""

    pool: Table
    target: Table
    heldout: Table
    scale: float
    seconds: float

    @property
    def rows(self) -> int:
        """Of the whole pool, after cleaning."""
        return round(len(self.pool) * self.scale)


def estimate(config: RunConfig) -> Estimate:
    """Measure up to 128 rows of each table and a few steps, and scale them up to the run. Leaves no run folder behind.

    Raises:
        GradPursuitError: whatever the run itself would refuse of configuration, data and model.
    """
    run = Run(config)
    check(run)
    sample = _sample(run)
    if sample.scale == 1:
        run.budget(sample.pool)
    if not config.warmup.trajectory:
        warmup_plan(config.warmup, sample.rows, run.seed("warmup"))  # refuses what the run would refuse
    with tuned_model(run, run.seed("adapter")) as model:
        dry_pass(model, run.compute, some_tokens(sample.pool))
    step = _step_seconds(run, sample)
    stages = {
        "data": Cost(sample.seconds, int(sum(map(_row_bytes, sample.pool)) * sample.scale)),
        "trajectory": _trajectory(run, sample, step),
        "gradients": _gradients(run, sample),
        "selection": _selection(run, sample),
        "evaluation": _evaluation(run, sample, step),
    }
    settings = config.evaluation
    rows = {
        "pool": sample.rows,
        "target": len(sample.target),
        "heldout": len(sample.heldout),
    }
    full = settings.epochs * -(-rows["pool"] // settings.batch_size) * step[settings.batch_size]
    cuda = run.compute.device.type == "cuda"
    return Estimate(
        stages,
        full,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        torch.cuda.max_memory_allocated() if cuda else None,
        rows,
        str(run.compute),
    )


def _sample(run: Run) -> Sample:
    """Up to 1,024 rows of the pool, drawn at random from all its sources, and the whole target."""
    config = run.config
    with tempfile.TemporaryDirectory() as scratch:
        drawn, scale = draw(config.data.pool, SAMPLE, Path(scratch))
        data, folder = config.data.model_copy(update={"pool": drawn}), Path(scratch) / "data"
        start = time.monotonic()
        prepare(data, run.renderer(), folder, config.evaluation.holdout, run.seed("holdout"))
        seconds = (time.monotonic() - start) * scale
        splits = (Table.read(folder / f"{name}.parquet") for name in ("pool", "target", "heldout"))
        pool, target, heldout = (Table(list(split)) for split in splits)
    return Sample(pool, target, heldout, scale, seconds)


def _row_bytes(row: Row) -> int:
    """Of a row in the data stage's files, before compression."""
    return len(row.original) + 8 * len(row.input_ids) + 128


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress of the measurements themselves."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


class _StepClock(TrainerCallback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.monotonic())


def _step_seconds(run: Run, sample: Sample) -> dict[int, float]:
    """Seconds of one training step, for every batch size that the run uses."""
    found = {}
    rows = list(sample.pool)
    for size in {run.config.warmup.batch_size, run.config.evaluation.batch_size}:
        clock = _StepClock()
        with tuned_model(run, run.seed("adapter")) as model, _quiet():
            spec = TrainSpec(_STEPS + 1, size, 1e-6, run.seed("warmup"), "training steps")
            train(model, rows, spec, run.compute, callbacks=[clock])
        found[size] = statistics.mean(np.diff(clock.times).tolist())  # from the end of the first, which warms up
    logger.info("measured: %s", ", ".join(f"a step of {size} rows {s:.2f} s" for size, s in found.items()))
    return found


def _trajectory(run: Run, sample: Sample, step: dict[int, float]) -> Cost:
    settings = run.config.warmup
    if settings.trajectory:
        return Cost(0.0)
    _, spec = warmup_plan(settings, sample.rows, run.seed("warmup"))
    with tuned_model(run, run.seed("adapter")) as model:
        size = sum(parameter.numel() for parameter in trainable(model).values())
    return Cost(spec.steps * step[settings.batch_size], 12 * size * settings.checkpoints)


@dataclass(frozen=True)
class _Start:
    """A checkpoint before any training: the adapter as it is, and moments that cost what real ones do."""

    def load_adapter(self, model: nn.Module) -> None:
        """The adapter is in the model already."""

    def adam(self, model: nn.Module) -> AdamState:
        """No gradient seen yet."""
        m = {name: torch.zeros_like(parameter) for name, parameter in trainable(model).items()}
        v = {name: torch.ones_like(parameter) for name, parameter in trainable(model).items()}
        return AdamState(m, v, 1, 0.9, 0.999, 1e-8)


def _gradients(run: Run, sample: Sample) -> Cost:
    """Collect the features of some rows, as the run will, and scale the time up by padded tokens."""
    settings, wanted = run.config.gradients, wanted_features(run)
    spec = CollectSpec(
        settings.dim,
        settings.nonzeros,
        0,
        settings.tokens_per_batch,
        settings.store_dtype,
        settings.shard_rows,
        1.0,
        {"model": {}},
    )
    cost = Cost(0.0)
    with tuned_model(run, run.seed("adapter")) as model, tempfile.TemporaryDirectory() as folder, _quiet():
        for name, table, scale in (("target", sample.target, 1.0), ("pool", sample.pool, sample.scale)):
            split = Split(name, table, wanted[name], Path(folder) / name)
            if split.gradients:
                made = Collector(model, run.compute, [_Start()], spec)  # type: ignore[list-item]
                cost += _collecting(made, split, split.gradients, scale, checkpoint_count(run))
            for signal in split.signals:
                forward = SignalCollector(model, run.compute, [], spec)
                cost += _collecting(forward, split, [signal], scale, 1 + checkpoint_count(run) * signal.along)
    return cost


def _collecting(made: StoreFiller[Any], split: Split, kinds: Sequence[Any], scale: float, points: int) -> Cost:
    """Of a split's features of some kinds at several points of the trajectory, measured at one."""
    some, spec = _spread(split.table, _ROWS), made.spec
    start = time.monotonic()
    engine = made.at(0, kinds)
    setup = time.monotonic() - start
    engine.batch([some[0]])  # the first pass warms up
    start = time.monotonic()
    made.collect(split.name, some, kinds, split.folder)
    rate = (time.monotonic() - start) / _padded_tokens(some, spec)
    seconds = (setup + rate * _padded_tokens(split.table, spec) * scale) * points
    stores = [replace(made.store_spec(split.table, kind), checkpoints=points) for kind in kinds]
    return Cost(seconds, int(sum(store.nbytes for store in stores) * scale))


def _spread(table: Table, count: int) -> Table:
    """Up to `count` rows of all lengths alike, in the order of the table."""
    by_length = sorted(range(len(table)), key=lambda i: len(table[i].input_ids))
    places = np.unique(np.linspace(0, len(table) - 1, min(count, len(table))).round().astype(int))
    return table.take(sorted(by_length[place] for place in places))


def _padded_tokens(table: Table, spec: CollectSpec) -> int:
    """Of all batches of a table, shard by shard."""
    total = 0
    for start in range(0, len(table), spec.shard_rows):
        lengths = [len(row.input_ids) for row in table[start : start + spec.shard_rows]]
        plan = token_batches(lengths, spec.tokens_per_batch)
        total += sum(len(batch) * padded_width(max(lengths[i] for i in batch)) for batch in plan)
    return total


def _chosen(run: Run, sample: Sample) -> int:
    """k, for the whole pool."""
    selection = run.config.selection
    return selection.k or math.ceil((selection.fraction or 0.05) * sample.rows)


def _selection(run: Run, sample: Sample) -> Cost:
    """At most: every pass over gradients that a strategy may make, as fast as memory is read."""
    settings = run.config
    block = np.ones((64 << 20) // 4, dtype=np.float32)
    start = time.monotonic()
    float(block @ block)
    rate = block.nbytes / max(time.monotonic() - start, 1e-9)
    rows = len(sample.pool) * sample.scale
    spec = StoreSpec(("",), checkpoint_count(run), settings.gradients.dim, settings.gradients.store_dtype, 1, {})
    return Cost(passes(run, _chosen(run, sample)) * rows * spec.nbytes / rate)


def passes(run: Run, k: int) -> int:
    """Over all gradients of the pool, by all strategies, at most; the signals of a forward pass are small beside them.

    Args:
        run: with the strategies.
        k: examples that each chooses.
    """
    total = 0
    for needs in (strategy.needs(run.settings) for strategy in run.strategies()):
        read = sum(isinstance(kind, Preconditioner) for kind in needs.features)
        total += read * (k if needs.passes == "k" else needs.passes)
    return total


def _evaluation(run: Run, sample: Sample, step: dict[int, float]) -> Cost:
    """At most: fine-tuning and scoring of every cell; subsets that two targets share are trained once."""
    settings, rows, names = run.config.evaluation, len(sample.pool) * sample.scale, target_names(run)
    own = _chosen(run, sample)
    wanted = [b if isinstance(b, int) else -(-b * rows // 1) for b in settings.budgets] or [own]
    equal = settings.steps or settings.epochs * -(-max(wanted) // settings.batch_size)
    full = [rows] if "full" in settings.endpoints else []
    trained = [*wanted * len(compared(run)), *full]  # rows of every training of one target, protocol and seed
    steps = sum(
        equal if protocol == "equal-steps" else settings.epochs * -(-k // settings.batch_size)
        for protocol in settings.protocols
        for k in trained
    )
    cells = len(settings.protocols) * len(trained) * settings.seeds * len(names)
    scores = cells * (len(names) if settings.crossed else 1) + len(names)
    scored = sample.heldout.take(range(0, len(sample.heldout), max(1, len(sample.heldout) // 32)))
    with tuned_model(run, run.seed("adapter")) as model, _quiet():
        score = Scorer(run.compute, load_tokenizer(run.config.model))
        score(model, scored)
        start = time.monotonic()
        score(model, scored)
    seconds = (time.monotonic() - start) * len(sample.heldout) / len(scored)
    return Cost(steps * settings.seeds * len(names) * step[settings.batch_size] + scores * seconds)
