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

from gradpursuit import __version__
from gradpursuit.cluster.errors import raised_by, reason_of, require_begun, require_same_version
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
_DEATHS = 3  # of workers at the same shard, or of all of them at the model before one could load it
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
    driver, and driver: the version of gradpursuit there; both must be those of every worker.
    """

    _filler: StoreFiller[Any] | None = None

    def __init__(self, open_filler: OpenFiller, precision: str, threads: int, driver: str) -> None:
        require_same_version(driver)
        self._open, self._precision, self._threads = open_filler, precision, threads
        self._stack, self._lines = ExitStack(), _Lines()
        logging.getLogger("gradpursuit").addHandler(self._lines)

    def begin(self) -> list[Line]:
        """Load the model, if it is not there; what was logged.

        Raises:
            RunError: it cannot be loaded here, or computes here in another precision.
        """
        import torch

        if self._filler is not None:
            return self._lines.taken()
        torch.set_num_threads(self._threads)
        try:
            filler = self._stack.enter_context(self._open())
        except (GradPursuitError, OSError) as error:
            raise RunError(
                f"node {socket.gethostname()}: {error} (every node must see the run folder, and the model, under the "
                "same path as this machine)"
            ) from None
        if filler.precision != self._precision:
            raise RunError(
                f"node {socket.gethostname()} computes in {filler.precision}, this machine in "
                f"{self._precision}: features would depend on who computed them; give model.precision: float32 or "
                "bfloat16, not auto"
            )
        self._filler = filler
        return self._lines.taken()

    def fill(self, task: ShardTask) -> tuple[dict[int, str], list[Line]]:
        """Compute and write what is not there yet of a task; the rows dropped, with reasons, and what was logged."""
        assert self._filler is not None
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


class _Work:
    """What is to be done: the shards that wait, and which worker is at which; None: it loads the model.

    The rows of a shard are read when a worker takes it, as all of them need not fit into memory here.
    """

    def __init__(self, table: Table, stores: Mapping[Any, GradientStore], todo: Todo[Any]) -> None:
        self._table, self._stores, self._todo = table, stores, todo
        self.waiting = deque(todo)
        self.busy: dict[Any, tuple[_Worker, ShardTask | None]] = {}

    @property
    def unfinished(self) -> bool:
        """Whether a shard waits, or a worker is at one."""
        return bool(self.waiting) or any(task for _, task in self.busy.values())

    def begin(self, worker: _Worker) -> None:
        """Let a worker load the model, or say that it has."""
        worker.ready = False
        self.busy[worker.actor.begin.remote()] = worker, None

    def share(self, workers: Sequence[_Worker]) -> None:
        """Give those that are ready and idle a shard each, as long as there are any."""
        for worker in self._idle(workers):
            if not self.waiting:
                return
            task = self._task(*self.waiting.popleft())
            self.busy[worker.actor.fill.remote(task)] = worker, task

    def give_back(self, task: ShardTask | None, workers: Sequence[_Worker]) -> None:
        """Let others of the `workers` do what one was at that was lost; those that are idle may be lost as well."""
        if task:
            self.waiting.appendleft((task.checkpoint, task.shard))
        for worker in self._idle(workers):
            self.begin(worker)

    def _idle(self, workers: Sequence[_Worker]) -> list[_Worker]:
        employed = {worker for worker, _ in self.busy.values()}
        return [worker for worker in workers if worker.ready and worker not in employed]

    def _task(self, t: int, s: int) -> ShardTask:
        folders = [self._stores[kind].shards for kind in self._todo[t, s]]
        return ShardTask(t, s, self._todo[t, s], folders, [self._table[i] for i in folders[0].range(s)])


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
    _most: int = 0  # workers that there has been room for
    _waiting: bool = False
    _looks: int = 0

    def __call__(
        self, table: Table, stores: Mapping[Any, GradientStore], todo: Todo[Any], advance: Callable[[int], None]
    ) -> Iterator[Mapping[int, str]]:
        """As :meth:`Fill.__call__`."""
        self.session.workers(self.resources)  # refuses where there is room for none
        work = _Work(table, stores, todo)
        while work.unfinished:
            work.share(self._workers)
            self._grow(work)
            for done in self._wait(list(work.busy)):
                worker, task = work.busy.pop(done)
                found = self._answer(done, worker, task)
                if found is None:
                    work.give_back(task, self._workers)
                elif task:
                    work.share(self._workers)
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

    def _grow(self, work: _Work) -> None:
        """Begin workers, as many as there is room and work for."""
        import ray

        room = self.session.room(self.resources)
        self._most = max(self._most, room)
        wanted = min(room, self.session.engine.workers or room, len(self._workers) + len(work.waiting))
        if not room and not self._waiting:
            logger.warning("no node of the cluster has room for a worker any more; waiting for one to join")
        self._waiting = not room
        options = {"num_cpus": self.resources.cpus, "num_gpus": self.resources.gpus, "max_restarts": 0}
        while len(self._workers) < wanted:
            actor = ray.remote(GradientWorker).options(**options, scheduling_strategy="SPREAD")
            self.begun += 1
            made: Any = actor.remote(self.open_filler, self.precision, self.resources.cpus, __version__)
            worker = _Worker(made, f"worker {self.begun}")
            self._workers.append(worker)
            work.begin(worker)

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

        require_begun(why)
        self._workers.remove(worker)
        self.lost += 1
        ray.kill(worker.actor)
        place, reason = task.name if task else _MODEL, reason_of(why)
        logger.warning("%s was lost at %s (%s); another one does it again", worker.name, place, reason)
        self._deaths[place] += 1
        # A shard is at one worker at a time, but a node that is lost takes all with it that load the model there.
        if self._deaths[place] >= _DEATHS * (1 if task else max(1, self._most)):
            raise RunError(
                f"{place}: {self._deaths[place]} workers died at it, the last: {reason}; do they have memory enough? "
                "Lower gradients.tokens_per_batch, or give engine.cpus more cores, so that fewer share a node. "
                "Finished shards are kept"
            )
