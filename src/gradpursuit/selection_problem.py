"""What a selection starts from: which rows can be chosen, and the problem that their features and the target's make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import TYPE_CHECKING, Any

from gradpursuit.gradient_stage import Split, gradient_folder, read_run_trajectory, target_features, wanted_features
from gradpursuit.remote import is_remote

if TYPE_CHECKING:
    from gradpursuit.cluster import Team
    from gradpursuit.data import Row, Table
    from gradpursuit.features import TrajectoryFeatures
    from gradpursuit.pipeline import Run
    from gradpursuit.selection import SelectionProblem
    from gradpursuit.store import GradientStore


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
def opened_problem(run: Run) -> Iterator[tuple[SelectionProblem, Any]]:
    """As :func:`load_problem`; where a run is computed on a cluster, its workers read the pool's features."""
    engine = run.config.engine
    if engine.name == "local" or not wanted_features(run)["pool"]:
        yield load_problem(run)
        return
    from gradpursuit.cluster import Team, connected

    with connected(engine) as session, Team.begin(session) as team:
        yield load_problem(run, team)


def load_problem(run: Run, team: Team | None = None, *, few: bool = False) -> tuple[SelectionProblem, Any]:
    """The selection problem of a run whose gradients are collected, for the target that is chosen for.

    Args:
        run: of the pool.
        team: who reads the pool's features; None: this process.
        few: only a few rows of the pool will be read, so what does not lie on a disk is fetched when it is used, and
            its checksums are not compared.

    Returns:
        The problem, and the positions in the pool's table of the rows it chooses from: all, but those without
        features and those that repeat a row of a target added later.

    Raises:
        StoreError: a store is incomplete, damaged or made with other settings.
    """
    import numpy as np

    from gradpursuit.selection import SelectionProblem

    candidates, pool = choosable(run), _pool(run)
    features = _features(run, pool, candidates, team, few=few)
    if run.in_domain:
        target, rows, groups = features, pool.table.take([]), np.zeros(len(candidates), dtype=np.int64)
    else:
        own = gradient_folder(run, run.config.selection.target) / "target"
        split = Split("target", run.target_table("target"), target_features(run), own)
        kept = kept_rows(run, split)
        target, rows = _features(run, split, kept), split.table if kept is None else split.table.take(kept.tolist())
        groups = np.unique([row.source for row in rows], return_inverse=True)[1].astype(np.int64)
    settings = run.settings
    return SelectionProblem(
        ids=[pool.table[i].id for i in candidates.tolist()],
        pool=features,
        target=target,
        groups=groups,
        rates=np.array([c.learning_rate for c in read_run_trajectory(run)]),
        gradients=settings.gradients,
        pursuit=settings.pursuit,
        options=settings.options,
        rows=pool.table.take(candidates.tolist()),
        target_rows=rows,
        text=_texts(run, pool.table, rows) if any(s.needs(settings).text for s in run.strategies()) else None,
    ), candidates


def _texts(run: Run, pool: Table, target: Table) -> Callable[[Row], str]:
    """What gives the text of a row of either table: what it says, without the chat template."""
    from gradpursuit.data.said import Said

    config = run.config.data
    own = [] if run.target else config.target or []  # the files of an added target have the columns of `data.columns`
    return Said([*config.pool, *own], config.columns, pool, target).text


def _features(run: Run, split: Split, rows: Any, team: Team | None = None, *, few: bool = False) -> dict[str, Any]:
    """The features of `rows` (positions in the split's table), by label; read by a team, or by this process."""
    import numpy as np

    from gradpursuit.features import TrajectoryFeatures

    found: dict[str, Any] = {}
    for kind, store in split.stores(run).items():
        kept, columns = store.columns("norm", "loss")
        places = np.searchsorted(kept, rows)
        if team is None:
            blocks = store.features(verify=not (few and is_remote(store.folder)))
            found[kind.label] = TrajectoryFeatures(blocks, columns).take(places)
        else:
            found[kind.label] = _on_workers(team, store, rows, {name: one[:, places] for name, one in columns.items()})
    return found


def _on_workers(team: Team, store: GradientStore, rows: Any, columns: dict[str, Any]) -> TrajectoryFeatures:
    from gradpursuit.cluster import ClusterFeatures, parts_of

    return ClusterFeatures(team, parts_of(store.shards, rows), columns=columns)
