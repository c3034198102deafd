"""Gradients on the workers of a cluster, if a run is configured so: `engine.name`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from gradpursuit.errors import ConfigError
from gradpursuit.remote import place, require_reached

if TYPE_CHECKING:
    from gradpursuit.config import RunConfig
    from gradpursuit.gradients.filling import StoreFiller
    from gradpursuit.pipeline import Run

Opener = Callable[["Run"], AbstractContextManager["StoreFiller[Any]"]]


def check_engine(config: RunConfig) -> None:
    """Refuse, before any work, what the engine cannot do.

    Raises:
        ConfigError: the engine, or the place of the features, needs what is not installed; or parts of the pool are to
            be pursued where it lies in one piece.
    """
    if config.engine.name == "ray":
        from gradpursuit.cluster import require_ray

        require_ray()
    if config.gradients.store:
        place(config.gradients.store)
    from gradpursuit.selection import Settings
    from gradpursuit.selection.gtp import GTP
    from gradpursuit.selection.scores import settings_of

    settings = Settings(config.gradients, config.pursuit, config.selection.options)
    for name in config.selection.strategies:
        method = settings.strategy(name).method
        if not isinstance(method, GTP):
            continue
        own: Any = settings_of(method, config.pursuit)
        if own.parts > 1 and (config.engine.name == "local" or own.subspace != "none"):
            raise ConfigError(
                f"strategy '{name}': parts is {own.parts}, but parts are pursued where features lie on workers: say "
                "--engine ray and leave subspace out, or leave parts out"
            )


def check_reach(config: RunConfig) -> None:
    """Refuse to begin hours of work for a cluster that is not there, or a place that cannot be written.

    Raises:
        RunError: no Ray listens at its address; or the place of the features cannot be reached or made.
    """
    if config.engine.address:
        from gradpursuit.cluster import require_listening

        require_listening(config.engine.address)
    if config.gradients.store:
        require_reached(place(config.gradients.store))


@contextmanager
def connection(run: Run) -> Iterator[None]:
    """Keep one connection to the cluster, if there is one, for all that this block does on it."""
    if run.config.engine.name == "local":
        yield
        return
    from gradpursuit.cluster import connected

    with connected(run.config.engine):
        yield


@contextmanager
def filling(run: Run, opened: Opener) -> Iterator[StoreFiller[Any]]:
    """What `opened` opens here; on a cluster, workers that have opened the same fill its shards.

    opened: a function of the run that any process can import.
    """
    engine, model = run.config.engine, run.config.model
    with opened(run) as made:
        if engine.name == "local":
            yield made
            return
        from gradpursuit.cluster import Resources, connected
        from gradpursuit.cluster.collect import ClusterFill

        with connected(engine) as session:
            resources = Resources(engine.cpus, gpus=int(model.device != "cpu" and session.has_gpus()))
            with ClusterFill(session, partial(opened, run), made.precision, resources) as made.fill:
                yield made
