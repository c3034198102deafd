"""Gradients on the workers of a cluster, if a run is configured so: `engine.name`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradpursuit.gradients.filling import StoreFiller
    from gradpursuit.pipeline import Run

Opener = Callable[["Run"], AbstractContextManager["StoreFiller[Any]"]]


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
