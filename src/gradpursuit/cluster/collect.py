"""Gradients on Ray: shards are tasks for workers that each hold the model; they join and die as they please."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

from gradpursuit.cluster.errors import raised_by, reason_of
from gradpursuit.cluster.session import Resources, Session
from gradpursuit.data import Row, Table
from gradpursuit.errors import GradPursuitError, RunError
from gradpursuit.gradients.filling import Kind, StoreFiller, Todo
from gradpursuit.store import GradientStore, ShardFolder

logger = logging.getLogger("gradpursuit")
OpenFiller = Callable[[], AbstractContextManager[StoreFiller[Any]]]
Line = tuple[int, str]  # of the log: level and message

_LOOK_AROUND = 1.0  # seconds after which it is seen whether nodes have joined
_PATIENCE = 60  # looks after which it is said that no worker has begun
_DEATHS = 3  # of workers at the same shard, or at the model before one could load it
_MODEL = "the model"


@dataclass(frozen=True)
class ShardTask:
    """One shard to compute at one checkpoint, for each kind that lacks it, and the folders that get it."""

    checkpoint: int
    shard: int
    kinds: Sequence[Kind]
    folders: Sequence[ShardFolder]
    rows: Sequence[Row]

    @property
    def name(self) -> str:
        """Where it is written, for messages."""
        return str(self.folders[0].path(self.checkpoint, self.shard))


class GradientWorker:
    """Holds a model, computes shards and writes them.

    open_filler: what makes the model and its checkpoints, on any machine that sees the run folder. precision: of the
    driver, which must be that of every worker.
    """

    def __init__(self, open_filler: OpenFiller, precision: str, threads: int) -> None:
        self._open, self._precision, self._threads = open_filler, precision, threads
        self._stack, self._lines = ExitStack(), _Lines()
        logging.getLogger("gradpursuit").addHandler(self._lines)

    def begin(self) -> list[Line]:
        """Load the model; what was logged.

        Raises:
            RunError: it cannot be loaded here, or computes here in another precision.
        """
        import torch

        torch.set_num_threads(self._threads)
        try:
            self._filler = self._stack.enter_context(self._open())
        except (GradPursuitError, OSError) as error:
            raise RunError(
                f"node {socket.gethostname()}: {error} (every node must see the run folder, and the model, under the "
                "same path as this machine)"
            ) from None
        if self._filler.precision != self._precision:
            raise RunError(
                f"node {socket.gethostname()} computes in {self._filler.precision}, this machine in "
                f"{self._precision}: features would depend on who computed them; give model.precision: float32 or "
                "bfloat16, not auto"
            )
        return self._lines.taken()

    def fill(self, task: ShardTask) -> tuple[dict[int, str], list[Line]]:
        """Compute and write what is not there yet of a task; the rows dropped, with reasons, and what was logged."""
        t, s, first = task.checkpoint, task.shard, task.folders[0]
        lacking = [(kind, to) for kind, to in zip(task.kinds, task.folders, strict=True) if not to.has(t, s)]
        if not lacking:
            return dict(first.columns(t, s).dropped), self._lines.taken()
        kinds = [kind for kind, _ in lacking]
        made = self._filler.shards(t, kinds, task.rows, first.range(s), lambda _: None)
        for (_, to), shard in zip(lacking, made, strict=True):
            try:
                to.write(t, s, shard)
            except RunError:
                if not to.has(t, s):  # a worker that was given up, but lives, may have been quicker
                    raise
        return dict(made[0].dropped), self._lines.taken()


class _Lines(logging.Handler):
    """Keeps warnings until they are taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self._kept.append((record.levelno, record.getMessage()))

    def taken(self) -> list[Line]:
        """Those that came since this was last asked."""
        lines, self._kept = self._kept, []
        return lines


@dataclass(eq=False)
class _Worker:
    actor: Any
    name: str
    ready: bool = False


@dataclass
class ClusterFill:
    """Fills shards with workers of a cluster; the face of :class:`~gradpursuit.gradients.filling.Fill`.

    There are as many workers as are configured, or as there is room for, and more when nodes join. A worker that dies
    gives its shard back.

    Raises (when called):
        RunError: the model cannot be loaded on a node, or workers keep dying at a shard, which is named.
        GradPursuitError: whatever a worker refuses; finished shards are kept.
    """

    session: Session
    open_filler: OpenFiller
    precision: str
    resources: Resources
    lost: int = 0
    begun: int = 0
    _workers: list[_Worker] = field(default_factory=list)
    _deaths: Counter[str] = field(default_factory=Counter)
    _waiting: bool = False
    _looks: int = 0

    def __call__(
        self, table: Table, stores: Mapping[Any, GradientStore], todo: Todo[Any], advance: Callable[[int], None]
    ) -> Iterator[Mapping[int, str]]:
        """As :meth:`Fill.__call__`."""
        self.session.workers(self.resources)  # refuses where there is room for none
        shards = next(iter(stores.values())).spec.shards()
        queue = deque(
            ShardTask(t, s, kinds, [stores[kind].shards for kind in kinds], [table[i] for i in shards[s]])
            for (t, s), kinds in todo.items()
        )
        busy: dict[Any, tuple[_Worker, ShardTask | None]] = {}
        for worker in self._workers:
            self._next(worker, queue, busy)
        while queue or any(task for _, task in busy.values()):
            self._grow(queue, busy)
            for done in self._wait(list(busy)):
                worker, task = busy.pop(done)
                found = self._answer(done, worker, task)
                if found is None:
                    if task:
                        queue.appendleft(task)
                    continue
                self._next(worker, queue, busy)
                if task:
                    advance(len(task.rows))
                    yield found

    def __enter__(self) -> ClusterFill:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers.clear()

    def _wait(self, references: list[Any]) -> list[Any]:
        import ray

        if not references:
            time.sleep(_LOOK_AROUND)
            return []
        done: list[Any] = ray.wait(references, num_returns=1, timeout=_LOOK_AROUND)[0]
        if not done and not any(worker.ready for worker in self._workers):
            self._looks += 1
            if self._looks == _PATIENCE:
                logger.warning("no worker has loaded the model yet; `ray status` tells whether the cluster has room")
        return done

    def _grow(self, queue: deque[ShardTask], busy: dict[Any, tuple[_Worker, ShardTask | None]]) -> None:
        """Begin workers, as many as there is room and work for."""
        import ray

        room = self.session.room(self.resources)
        wanted = min(room, self.session.engine.workers or room, len(self._workers) + len(queue))
        if not room and not self._waiting:
            logger.warning("no node of the cluster has room for a worker any more; waiting for one to join")
        self._waiting = not room
        options = {"num_cpus": self.resources.cpus, "num_gpus": self.resources.gpus, "max_restarts": 0}
        while len(self._workers) < wanted:
            actor = ray.remote(GradientWorker).options(**options, scheduling_strategy="SPREAD")
            self.begun += 1
            made: Any = actor.remote(self.open_filler, self.precision, self.resources.cpus)
            worker = _Worker(made, f"worker {self.begun}")
            self._workers.append(worker)
            busy[made.begin.remote()] = worker, None

    def _next(
        self, worker: _Worker, queue: deque[ShardTask], busy: dict[Any, tuple[_Worker, ShardTask | None]]
    ) -> None:
        """Give a worker that is idle and ready something to do."""
        if worker.ready and queue:
            task = queue.popleft()
            busy[worker.actor.fill.remote(task)] = worker, task

    def _answer(self, reference: Any, worker: _Worker, task: ShardTask | None) -> Mapping[int, str] | None:
        """The dropped rows of a finished task (none of a worker that is ready now); None: the worker is lost."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            answer = ray.get(reference)
        except RayTaskError as error:
            raise raised_by(error) from None
        except RayError as error:
            self._lose(worker, task, error)
            return None
        if not task:
            del self._deaths[_MODEL]
        worker.ready = True
        dropped, lines = answer if task else ({}, answer)
        for level, message in lines:
            logger.log(level, "%s: %s", worker.name, message)
        return dict(dropped)

    def _lose(self, worker: _Worker, task: ShardTask | None, why: BaseException) -> None:
        import ray

        self._workers.remove(worker)
        self.lost += 1
        ray.kill(worker.actor)
        place = task.name if task else _MODEL
        logger.warning("%s was lost at %s; another one does it again", worker.name, place)
        self._deaths[place] += 1
        if self._deaths[place] >= _DEATHS:
            raise RunError(
                f"{place}: {_DEATHS} workers died at it, the last: {reason_of(why)}; do they have memory enough? Lower "
                "gradients.tokens_per_batch, or give engine.cpus more cores, so that fewer share a node. Finished "
                "shards are kept"
            )
