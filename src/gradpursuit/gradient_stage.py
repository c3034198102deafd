"""The features of a run: which are wanted, how they are collected, whether they are whole, and what is made of them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradpursuit.counting import finished_rows
from gradpursuit.errors import ConfigError, StoreError, TrajectoryError
from gradpursuit.plugins import foreign
from gradpursuit.remote import place, reaching
from gradpursuit.spread import connection, filling

if TYPE_CHECKING:
    from pathlib import Path

    from gradpursuit.config import SelectionSection
    from gradpursuit.data import Table
    from gradpursuit.gradients.collector import Collector, SignalCollector
    from gradpursuit.gradients.filling import StoreFiller
    from gradpursuit.gradients.forward import Signal
    from gradpursuit.gradients.preconditioner import Preconditioner
    from gradpursuit.pipeline import Run
    from gradpursuit.store import GradientStore
    from gradpursuit.trajectory.checkpoint import Checkpoint

    FeatureKind = Preconditioner | Signal

logger = logging.getLogger("gradpursuit")
FEATURE_OPTIONS = (
    "preconditioner",
    "features",
    "like",
    "clusters",
)  # of this package's strategies; the others change no feature
_NAMED = 5  # damaged shards of one store that are named


@dataclass(frozen=True)
class Split:
    """Rows whose features are wanted, of which kinds, and the folder that gets one store for each."""

    name: str
    table: Table
    kinds: Sequence[FeatureKind]
    folder: Path

    @property
    def gradients(self) -> list[Preconditioner]:
        """The kinds that take a backward pass."""
        from gradpursuit.gradients.preconditioner import Preconditioner

        return [kind for kind in self.kinds if isinstance(kind, Preconditioner)]

    @property
    def signals(self) -> list[Signal]:
        """The kinds that a forward pass gives."""
        from gradpursuit.gradients.forward import Signal

        return [kind for kind in self.kinds if isinstance(kind, Signal)]

    def stores(self, run: Run) -> dict[FeatureKind, GradientStore]:
        """What was collected, one complete store for each kind.

        Raises:
            StoreError: a store is not there, or was made with other settings: the part that differs is named.
        """
        from gradpursuit.gradients.collector import signal_origin
        from gradpursuit.gradients.filling import identity
        from gradpursuit.store import GradientStore

        origin, settings = collect_spec(run).origin, run.config.gradients
        sketched = {**origin, "dim": settings.dim, "dtype": settings.store_dtype}
        wanted: dict[FeatureKind, dict[str, Any]] = {
            **dict.fromkeys(self.gradients, sketched),
            **{kind: signal_origin(origin, kind) for kind in self.signals},
        }
        return {
            kind: GradientStore.open(self.folder / kind.label, {**wanted[kind], **identity(self.table, kind)})
            for kind in self.kinds
        }


def target_features(run: Run) -> list[FeatureKind]:
    """The kinds of features that the configured strategies need of a target."""
    return _distinct(kind.for_target for kind in _needed(run))


def wanted_features(run: Run) -> dict[str, list[FeatureKind]]:
    """The kinds of features that the configured strategies need, of the run's own `target` and of the `pool`.

    A pool that is its own target has those of a target as well.
    """
    pool, target = _needed(run), target_features(run)
    if run.config.data.in_domain:
        return {"target": [], "pool": _distinct([*pool, *target])}
    return {"target": target, "pool": pool}


def feature_requests(selection: SelectionSection, names: Sequence[str] = ()) -> list[str]:
    """What the features that a selection needs depend on: distinct ways of choosing, with the options that matter.

    Told without loading a strategy: so that features are still those that are wanted when other settings change.

    Args:
        selection: with strategies and their options.
        names: of the strategies that are meant; none: all that are configured.
    """
    found: set[str] = set()
    others = foreign()

    def add(name: str) -> None:
        own = dict(selection.options.get(name, {}))
        selector = str(own.pop("selector", name))
        kept = {key: value for key, value in own.items() if key in FEATURE_OPTIONS or selector in others}
        request = json.dumps([selector, kept], sort_keys=True, default=str)
        if request not in found:
            found.add(request)
            if selector == "random-matched":
                add(str(kept.get("like", "gtp")))

    for name in names or selection.strategies:
        add(name)
    return sorted(found)


def collected_requests(run: Run) -> list[str]:
    """The :func:`feature_requests` that the features of a run are known by: those they were collected for, while they
    hold what is wanted now; other ways of choosing may go by the same features."""
    wanted, known = feature_requests(run.config.selection), _planned_requests(run)
    return sorted(known) if set(wanted) <= set(known) or (known and _suffices(run)) else wanted


def _suffices(run: Run) -> bool:
    """Whether the features that the stage was begun for are all that the configured strategies need."""
    plan = run.manifest.entry("gradients")["plan"]
    try:
        wanted = wanted_features(run)
    except ConfigError:  # of a strategy that is not to be had any more, told before it would be used
        return False
    return all(kind.label in (*plan[split], *plan["signals"][split]) for split in wanted for kind in wanted[split])


def planned_for_target(run: Run) -> list[str]:
    """Labels of the features that the configured strategies need of a target, as it was known when the stage began."""
    known, wanted = _planned_requests(run), feature_requests(run.config.selection)
    if known and not set(wanted) <= set(known):
        return [kind.label for kind in target_features(run)]
    return list(dict.fromkeys(label for name in wanted for label in known.get(name, ())))


def _planned_requests(run: Run) -> dict[str, list[str]]:
    plan = run.manifest.entry("gradients").get("plan", {})
    found: dict[str, list[str]] = plan["requests"] if plan.get("basis") == run.feature_basis else {}
    return found


def _needed(run: Run) -> list[FeatureKind]:
    return _distinct(kind for strategy in run.strategies() for kind in strategy.needs(run.settings).features)


def _distinct(kinds: Iterable[FeatureKind | None]) -> list[FeatureKind]:
    return list(dict.fromkeys(kind for kind in kinds if kind is not None))


def splits(run: Run) -> list[Split]:
    """The run's own target and its pool."""
    folder = gradient_folder(run)
    return [Split(name, run.table(name), kinds, folder / name) for name, kinds in wanted_features(run).items()]


def gradient_folder(run: Run, target: str | None = None) -> Path:
    """Where the stores of a run, or of a target added to it, lie: in its folder, or where `gradients.store` says.

    Raises:
        ConfigError: `gradients.store` cannot be reached with what is installed.
    """
    added = ("targets", target) if target else ()
    store = run.config.gradients.store
    return place(store).joinpath(*added) if store else run.folder.joinpath(*added, "gradients")


def claim_store(run: Run) -> None:
    """See that no other run writes where the stores of this one lie; the lock of the run must be held.

    Raises:
        StoreError: another run does, or something else lies there.
    """
    from gradpursuit.owner import claim

    if run.config.gradients.store:
        claim(gradient_folder(run), run.folder)


def collect_gradients(run: Run) -> dict[str, Any]:
    """The stage."""
    made = splits(run)
    dropped = collect(run, made, run.folder)
    return {"features": [kind.label for kind in made[-1].kinds], "dropped": dropped}


def collect(run: Run, wanted: Sequence[Split], folder: Path) -> dict[str, int]:
    """Compute the features of splits, one after the other, along the trajectory of a run.

    Args:
        run: of the trajectory.
        wanted: the splits.
        folder: of the run or the added target that they belong to; rows without a feature are listed there, with the
            reason, in `gradients/dropped.jsonl`.

    Returns:
        How many rows were dropped, by split and reason.
    """
    from gradpursuit.data import drop_record
    from gradpursuit.files import write_text

    if not any(split.kinds for split in wanted):
        return {}
    dropped: dict[str, dict[int, str]] = {split.name: {} for split in wanted}

    def fill(split: Split, made: StoreFiller[Any], kinds: Sequence[FeatureKind]) -> None:
        for store in made.collect(split.name, split.table, kinds, split.folder).values():
            dropped[split.name].update(store.dropped())

    with connection(run):
        if any(split.gradients for split in wanted):
            with filling(run, collector) as made:
                for split in wanted:
                    if split.gradients:
                        fill(split, made, split.gradients)
        if any(split.signals for split in wanted):
            with filling(run, signal_collector) as forward:
                for split in wanted:
                    for signal in split.signals:
                        fill(split, forward, [signal])
    lines = [
        drop_record(split.name, split.table[row], reason)
        for split in wanted
        for row, reason in sorted(dropped[split.name].items())
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(folder / "gradients" / "dropped.jsonl", text)
    reasons = Counter(f"{line['split']}: {line['reason']}" for line in lines)
    for reason, count in reasons.items():
        logger.warning("no features for %d rows of %s; they are left out and listed in dropped.jsonl", count, reason)
    return dict(reasons)


@contextmanager
def collector(run: Run) -> Iterator[Collector]:
    """What computes the features of a run: its model at its checkpoints, with its settings."""
    from gradpursuit.gradients.collector import Collector

    checkpoints = read_run_trajectory(run)
    with tuned_model(run, run.seed("adapter")) as model:
        yield Collector(model, run.compute, checkpoints, collect_spec(run))


@contextmanager
def signal_collector(run: Run) -> Iterator[SignalCollector]:
    """What computes the signals of a forward pass: a model of its own, as it was before any training."""
    from gradpursuit.gradients.collector import SignalCollector

    checkpoints = read_run_trajectory(run)
    with tuned_model(run, run.seed("adapter")) as model:
        yield SignalCollector(model, run.compute, checkpoints, collect_spec(run))


def collect_spec(run: Run) -> Any:
    """The settings of a run's features, and the model, adapter and trajectory that they belong to."""
    from gradpursuit.gradients.filling import CollectSpec

    settings, model = run.config.gradients, run.config.model.model_dump(mode="json")
    origin = {
        "model": run.model_identity,
        "adapter": {name: model[name] for name in ("lora", "layers")},
        "trajectory": run.manifest.fingerprint("trajectory"),
    }
    return CollectSpec(
        dim=settings.dim,
        nonzeros=settings.nonzeros,
        sketch_seed=run.seed("sketch"),
        tokens_per_batch=settings.tokens_per_batch,
        dtype=settings.store_dtype,
        shard_rows=settings.shard_rows,
        max_dropped=settings.max_dropped,
        origin=origin,
    )


def tuned_model(run: Run, seed: int) -> AbstractContextManager[Any]:
    """The base model with what is trained of it, fresh from `seed`: of the kind that the run's trajectory has."""
    from gradpursuit.trajectory.tuning import tuned

    given = run.inputs.checkpoints
    return tuned(run.base, run.config.model, seed, given[0] if given else None)


def read_run_trajectory(run: Run) -> list[Checkpoint]:
    """The checkpoints of a run, as many as it is configured to have.

    Raises:
        TrajectoryError: one is missing or broken.
    """
    from gradpursuit.trajectory.checkpoint import read_trajectory

    folder, wanted = run.folder / "trajectory", checkpoint_count(run)
    found = read_trajectory(folder)
    if len(found) != wanted:
        raise TrajectoryError(f"{folder}: holds {len(found)} of {wanted} checkpoints; run the warm-up again")
    return found


def checkpoint_count(run: Run) -> int:
    """T: as configured, or as many as the given trajectory has."""
    return len(run.inputs.checkpoints) or run.config.warmup.checkpoints


def gradients_plan(run: Run) -> dict[str, Any]:
    """What the stage is going to write: labels by split, and of `signals` by split; what each way of choosing needs of
    a target."""
    found = {split.name: split for split in splits(run)}
    plan: dict[str, Any] = {name: [kind.label for kind in split.gradients] for name, split in found.items()}
    plan["signals"] = {name: [kind.label for kind in split.signals] for name, split in found.items()}
    requests = {name: _planned_requests(run).get(name, []) for name in collected_requests(run)}
    for strategy in run.strategies():
        needs = _distinct(kind.for_target for kind in strategy.needs(run.settings).features)
        for name in feature_requests(run.config.selection, [strategy.name]):
            requests[name] = sorted({*requests[name], *(kind.label for kind in needs)})
    return {**plan, "requests": requests, "basis": run.feature_basis}


def gradient_rows(run: Run) -> dict[str, tuple[int, int]]:
    """Rows × checkpoints that the stage was begun for, finished and in all, by what the work on them is called.

    Loads no model.
    """
    rows, plan = run.manifest.entry("data").get("detail", {}).get("rows"), run.manifest.entry("gradients").get("plan")
    if not rows or not plan:
        return {}
    settings, folder, count = run.config.gradients, gradient_folder(run), checkpoint_count(run)
    shards = {"shard_rows": settings.shard_rows}
    trained = {**shards, "trajectory": run.manifest.entry("trajectory").get("fingerprint")}
    sketched = {**trained, "dim": settings.dim, "dtype": settings.store_dtype}
    found = {}
    with reaching(folder):
        for name in ("target", "pool"):
            if labels := plan[name]:
                found[f"gradients of the {name}"] = finished_rows(folder / name, labels, sketched), rows[name] * count
            for label in plan["signals"][name]:
                along = label == "el2n"
                finished = finished_rows(folder / name, [label], trained if along else shards)
                found[f"{label} of the {name}"] = finished, rows[name] * (count + 1 if along else 1)
    return found


def gradients_intact(run: Run, quick: bool) -> bool:
    """Whether every shard of pool and target is there and unchanged; each that is not is named."""
    if quick:
        return all(done == total for done, total in gradient_rows(run).values())
    problems = [problem for split in splits(run) for problem in store_problems(run, split)]
    for problem in problems:
        logger.warning("%s", problem)
    return not problems


def store_problems(run: Run, split: Split) -> list[str]:
    """What is wrong with the stores of a split, one line each; all bytes are read."""
    try:
        stores: Mapping[Any, GradientStore] = split.stores(run)
    except StoreError as error:
        return [str(error)]
    found = {store.folder: store.verify() for store in stores.values()}
    lines = []
    for folder, problems in found.items():
        lines += [f"{problem.path}: {problem.reason}" for problem in problems[:_NAMED]]
        if len(problems) > _NAMED:
            lines.append(f"{folder}: and {len(problems) - _NAMED} more shards like these")
    return lines
