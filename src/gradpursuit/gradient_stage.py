"""The features of a run: which are wanted, how they are collected, whether they are whole, and what is made of them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

from gradpursuit.counting import finished_rows
from gradpursuit.errors import StoreError, TrajectoryError
from gradpursuit.remote import reaching

if TYPE_CHECKING:
    from pathlib import Path

    from gradpursuit.cluster import Team
    from gradpursuit.data import Table
    from gradpursuit.gradients.collector import Collector
    from gradpursuit.gradients.preconditioner import Preconditioner
    from gradpursuit.pipeline import Run
    from gradpursuit.selection import SelectionProblem
    from gradpursuit.store import GradientStore
    from gradpursuit.trajectory.checkpoint import Checkpoint

logger = logging.getLogger("gradpursuit")
_NAMED = 5  # damaged shards of one store that are named


@dataclass(frozen=True)
class Split:
    """Rows whose features are wanted, with which preconditioners, and the folder that gets one store for each."""

    name: str
    table: Table
    kinds: Sequence[Preconditioner]
    folder: Path

    def stores(self, run: Run) -> dict[Preconditioner, GradientStore]:
        """What was collected, one complete store for each preconditioner.

        Raises:
            StoreError: a store is not there, or was made with other settings: the part that differs is named.
        """
        from gradpursuit.gradients.collector import identity
        from gradpursuit.store import GradientStore

        wanted = {
            **collect_spec(run).origin,
            "dim": run.config.gradients.dim,
            "dtype": run.config.gradients.store_dtype,
        }
        return {
            kind: GradientStore.open(self.folder / kind.label, {**wanted, **identity(self.table, kind)})
            for kind in self.kinds
        }


def wanted_features(run: Run) -> dict[str, list[Preconditioner]]:
    """The preconditioners that the configured strategies need, of the `target` and of the `pool`."""
    kinds = list(dict.fromkeys(k for strategy in run.strategies() for k in strategy.needs(run.config.gradients)))
    return {"target": list(dict.fromkeys(kind.for_target for kind in kinds)), "pool": kinds}


def splits(run: Run) -> list[Split]:
    """The run's own target and its pool."""
    return [
        Split(name, run.table(name), kinds, gradient_folder(run) / name) for name, kinds in wanted_features(run).items()
    ]


def gradient_folder(run: Run, target: str | None = None) -> Path:
    """Where the stores of a run, or of a target added to it, lie: in its folder, or where `gradients.store` says.

    Raises:
        ConfigError: `gradients.store` cannot be reached with what is installed.
    """
    from gradpursuit.remote import place

    added = ("targets", target) if target else ()
    store = run.config.gradients.store
    return place(store).joinpath(*added) if store else run.folder.joinpath(*added, "gradients")


def collect_gradients(run: Run) -> dict[str, Any]:
    """The stage."""
    made = splits(run)
    dropped = collect(run, made)
    return {"features": [kind.label for kind in made[-1].kinds], "dropped": dropped}


def collect(run: Run, wanted: Sequence[Split]) -> dict[str, int]:
    """Compute the features of splits, one after the other, along the trajectory of a run.

    Rows without a feature are listed, with the reason, in `dropped.jsonl` beside the stores.

    Returns:
        How many rows were dropped, by split and reason.
    """
    from gradpursuit.data import drop_record
    from gradpursuit.files import write_text

    if not any(split.kinds for split in wanted):
        return {}
    records: dict[Path, list[dict[str, Any]]] = {split.folder.parent: [] for split in wanted}
    with collector(run) as made, _spread(run, made):
        for split in wanted:
            stores = made.collect(split.name, split.table, split.kinds, split.folder)
            dropped = {row: reason for store in stores.values() for row, reason in store.dropped().items()}
            for row, reason in sorted(dropped.items()):
                records[split.folder.parent].append(drop_record(split.name, split.table[row], reason))
    for folder, lines in records.items():
        write_text(folder / "dropped.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    reasons = Counter(f"{line['split']}: {line['reason']}" for lines in records.values() for line in lines)
    for reason, count in reasons.items():
        logger.warning("no gradient for %d rows of %s; they are left out and listed in dropped.jsonl", count, reason)
    return dict(reasons)


@contextmanager
def collector(run: Run) -> Iterator[Collector]:
    """What computes the features of a run: its model at its checkpoints, with its settings."""
    from gradpursuit.gradients.collector import Collector

    checkpoints = read_run_trajectory(run)
    with tuned_model(run, run.seed("adapter")) as model:
        yield Collector(model, run.compute, checkpoints, collect_spec(run))


@contextmanager
def _spread(run: Run, made: Collector) -> Iterator[None]:
    """Let the workers of a cluster fill the shards of this block, if the run is computed on one."""
    engine, model = run.config.engine, run.config.model
    if engine.name == "local":
        yield
        return
    from gradpursuit.cluster import ClusterFill, Resources, connected

    with connected(engine) as session:
        resources = Resources(engine.cpus, gpus=int(model.device != "cpu" and session.has_gpus()))
        with ClusterFill(session, partial(collector, run), made.precision, resources) as made.fill:
            yield


def collect_spec(run: Run) -> Any:
    """The settings of a run's features, and the model, adapter and trajectory that they belong to."""
    from gradpursuit.gradients.collector import CollectSpec

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
    from gradpursuit.trajectory.imported import checkpoint_folders
    from gradpursuit.trajectory.tuning import tuned

    paths = run.config.warmup.trajectory
    return tuned(run.base, run.config.model, seed, checkpoint_folders(paths)[0] if paths else None)


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
    if not run.config.warmup.trajectory:
        return run.config.warmup.checkpoints
    from gradpursuit.trajectory.imported import checkpoint_folders

    return len(checkpoint_folders(run.config.warmup.trajectory))


def kept_rows(run: Run, split: Split) -> Any:
    """Positions of the rows of a split that have features in all its stores, int64 ascending; None without stores."""
    import numpy as np

    kept = [store.kept() for store in split.stores(run).values()]
    return reduce(np.intersect1d, kept) if kept else None


def choosable(run: Run) -> Any:
    """Positions in the pool's table of the rows that can be chosen: with features, and no repetition of the target."""
    import numpy as np

    kept = kept_rows(run, _pool(run))
    return run.candidates() if kept is None else np.intersect1d(run.candidates(), kept)


def _pool(run: Run) -> Split:
    return Split("pool", run.table("pool"), wanted_features(run)["pool"], gradient_folder(run) / "pool")


@contextmanager
def pool_workers(run: Run) -> Iterator[Team | None]:
    """Who reads the pool's features in this block: workers of a cluster, or (None) this process."""
    if run.config.engine.name == "local" or not wanted_features(run)["pool"]:
        yield None
        return
    from gradpursuit.cluster import Team, connected

    with connected(run.config.engine) as session:
        team = Team.begin(session)
        try:
            yield team
        finally:
            team.close()


def load_problem(run: Run, team: Team | None = None) -> tuple[SelectionProblem, Any]:
    """The selection problem of a run whose gradients are collected, for the target that is chosen for.

    Args:
        run: of the pool.
        team: who reads the pool's features; None: this process.

    Returns:
        The problem, and the positions in the pool's table of the rows it chooses from: all, but those without
        features and those that repeat a row of a target added later.

    Raises:
        StoreError: a store is incomplete, damaged or made with other settings.
    """
    import numpy as np

    from gradpursuit.selection import SelectionProblem

    wanted, candidates = wanted_features(run), choosable(run)
    pool = _pool(run)
    own = gradient_folder(run, run.config.selection.target) / "target"
    target = Split("target", run.target_table("target"), wanted["target"], own)
    kept = kept_rows(run, target)
    sources = [row.source for row in target.table]
    if kept is not None:
        sources = [sources[i] for i in kept.tolist()]
    return SelectionProblem(
        ids=[pool.table[i].id for i in candidates.tolist()],
        pool=_features(run, pool, candidates) if team is None else _spread_features(run, pool, candidates, team),
        target=_features(run, target, kept),
        groups=np.unique(sources, return_inverse=True)[1].astype(np.int64),
        rates=np.array([c.learning_rate for c in read_run_trajectory(run)]),
        gradients=run.config.gradients,
        pursuit=run.config.pursuit,
    ), candidates


def _features(run: Run, split: Split, rows: Any) -> dict[str, Any]:
    """The features of `rows` (positions in the split's table), by label."""
    import numpy as np

    from gradpursuit.selection.features import TrajectoryFeatures

    return {
        kind.label: TrajectoryFeatures(store.features()).take(np.searchsorted(store.kept(), rows))
        for kind, store in split.stores(run).items()
    }


def _spread_features(run: Run, split: Split, rows: Any, team: Team) -> dict[str, Any]:
    """The same, where they lie on the workers of a cluster."""
    from gradpursuit.cluster import ClusterFeatures, parts_of

    return {
        kind.label: ClusterFeatures(team, parts_of(store.shards, rows)) for kind, store in split.stores(run).items()
    }


def gradients_plan(run: Run) -> dict[str, Any]:
    """The stores that the stage is going to write."""
    return {name: [kind.label for kind in kinds] for name, kinds in wanted_features(run).items()}


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
    folder, count = gradient_folder(run), checkpoint_count(run)
    with reaching(folder):
        return {
            name: (finished_rows(folder / name, labels, made_with), rows[name] * count)
            for name, labels in plan.items()
            if labels
        }


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
