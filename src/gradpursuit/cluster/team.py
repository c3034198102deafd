"""The workers of a pursuit, and who of them owns which part: a worker that is lost leaves its parts to the others."""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradpursuit import __version__
from gradpursuit.cluster.errors import raised_by, reason_of, require_begun
from gradpursuit.cluster.session import Resources, Session
from gradpursuit.cluster.shards import Part, ShardWorker, View
from gradpursuit.errors import RunError
from gradpursuit.pursuit.rows import Float64Array

logger = logging.getLogger("gradpursuit")
_DEATHS = 3  # that the same part may have been owned through
_PATIENCE = 60.0  # seconds without any answer after which it is said that there is none

Ask = Callable[[Any, tuple[int, ...]], Any]  # (actor, numbers of parts) -> the reference of its answer


@dataclass(eq=False)
class Member:
    """A worker; `name` is what messages call it."""

    actor: Any
    name: str


@dataclass
class Team:
    """Worker processes, at most `count` at first, placed wherever the cluster has room.

    lost: how many have died; a new one is begun when none is left.
    """

    session: Session
    resources: Resources
    members: list[Member] = field(default_factory=list)
    lost: int = 0
    _begun: int = 0
    _told: bool = False

    @classmethod
    def begin(cls, session: Session, count: int | None = None) -> Team:
        """A team of `count` workers (None: as many as there are to be)."""
        resources = Resources(session.engine.cpus)
        team = cls(session, resources)
        for _ in range(count or session.workers(resources)):
            team.add()
        return team

    def add(self) -> Member:
        """One more worker, in a process of its own."""
        import ray

        options = {"num_cpus": self.resources.cpus, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(ShardWorker).options(**options).remote(self.resources.cpus, __version__)
        self._begun += 1
        member = Member(actor, f"worker {self._begun}")
        self.members.append(member)
        return member

    def lose(self, member: Member, why: BaseException) -> None:
        """Know of a worker that died; once is enough."""
        import ray

        if member in self.members:
            self.members.remove(member)
            self.lost += 1
            ray.kill(member.actor)  # if it only cannot be reached, it must not come back
            logger.warning(
                "%s was lost (%s); %s over its shards",
                member.name,
                reason_of(why),
                f"the others ({len(self.members)}) take" if self.members else "a new one takes",
            )

    def tell_waiting(self, members: Sequence[Member]) -> None:
        """Say once that there is no answer yet."""
        if not self._told:
            self._told = True
            names = ", ".join(member.name for member in members)
            logger.warning("no answer yet from %s; `ray status` tells whether the cluster has room for them", names)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        import ray

        for member in self.members:
            ray.kill(member.actor)
        self.members.clear()


class Ownership:
    """Which worker of a team owns which of the parts of a pool.

    parts: in the order of their ids. members: who shares them out at first, each a run of neighbours with nearly as
    many rows as the others'.
    """

    def __init__(self, team: Team, parts: Sequence[Part], owners: Sequence[int] | None = None) -> None:
        self.pool, self.parts, self.team = uuid.uuid4().hex, list(parts), team
        self.starts = np.cumsum([0, *(len(part.rows) for part in parts)])
        self._views: dict[str, tuple[tuple[int, ...], Float64Array | None]] = {}
        self._owner: dict[int, Member] = {}
        self._informed: dict[int, Any] = {}  # part -> reference that is resolved when its owner knows
        self._deaths: Counter[int] = Counter()
        members = list(team.members)
        given = shares([len(part.rows) for part in parts], len(members)) if owners is None else owners
        self._assign({number: members[owner] for number, owner in enumerate(given)})

    @property
    def workers(self) -> int:
        """How many own something."""
        return len({member.name for member in self._owner.values()})

    def ask(
        self, ask: Ask, numbers: Sequence[int] | None = None, *, together: Sequence[Sequence[int]] | None = None
    ) -> Iterator[tuple[tuple[int, ...], Any]]:
        """Ask the owners of parts (None: of all); (numbers of parts, answer) of each, as they come.

        What an owner that dies has not answered is asked again of the new owners, for its parts alone.

        together: parts about each group of which one worker is asked, which gets those it does not own.

        Raises:
            GradPursuitError: what the worker raised.
            RunError: a part has outlived several owners, or workers cannot begin.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        pending: dict[Any, tuple[Member, tuple[int, ...]]] = {}

        def send(wanted: Sequence[int]) -> None:
            for member, mine in self._grouped(wanted):
                pending[ask(member.actor, mine)] = member, mine

        def send_together(group: Sequence[int]) -> None:
            owner = self._owner[group[0]]
            self._assign({number: owner for number in group if self._owner[number] is not owner})
            send(group)

        for group in together or []:
            send_together(group)
        if together is None:
            send(range(len(self.parts)) if numbers is None else numbers)
        while pending:
            finished, _ = ray.wait(list(pending), num_returns=1, timeout=_PATIENCE)
            if not finished:
                self.team.tell_waiting([member for member, _ in pending.values()])
                continue
            (done,) = finished
            member, mine = pending.pop(done)
            try:
                answer = ray.get(done)
            except RayTaskError as error:
                raise raised_by(error) from None
            except RayError as error:
                self._hand_over(member, error)
                (send if together is None else send_together)(mine)
            else:
                yield mine, answer

    def add_view(self, checkpoints: tuple[int, ...], factor: Float64Array | None) -> str:
        """Let the owners see their rows in one more view, and its name; factor: float64 [T, N] or None for 1."""
        name = uuid.uuid4().hex
        self._views[name] = checkpoints, factor
        for member, mine in self._grouped(range(len(self.parts))):
            member.actor.see.remote(self.pool, name, self._view(name, mine))
        return name

    def drop_view(self, name: str) -> None:
        """Nobody looks at that view any more."""
        import ray

        del self._views[name]
        if ray.is_initialized():
            for member in {id(member): member for member in self._owner.values()}.values():
                member.actor.drop.remote(self.pool, name)

    def _view(self, name: str, numbers: tuple[int, ...]) -> dict[int, View]:
        checkpoints, factor = self._views[name]
        cuts = {number: slice(self.starts[number], self.starts[number + 1]) for number in numbers}
        return {n: View(checkpoints, None if factor is None else factor[:, cut]) for n, cut in cuts.items()}

    def _grouped(self, numbers: Sequence[int]) -> list[tuple[Member, tuple[int, ...]]]:
        groups: dict[str, tuple[Member, list[int]]] = {}
        for number in sorted(numbers):
            member = self._owner[number]
            groups.setdefault(member.name, (member, []))[1].append(number)
        return [(member, tuple(mine)) for member, mine in groups.values()]

    def _hand_over(self, member: Member, why: BaseException) -> None:
        """The parts of a lost worker go to those that own the fewest rows."""
        require_begun(why)
        self.team.lose(member, why)
        orphans = [number for number, owner in self._owner.items() if owner is member]
        # All workers of a lost node are dead before it is known of them all: what one of them was given meanwhile did
        # not kill it. When none is left it counts, as it may be that new ones die before they can be told anything.
        self._deaths.update(number for number in orphans if not self.team.members or self._was_told(number))
        for number in orphans:
            if self._deaths[number] >= _DEATHS:
                part = self.parts[number]
                raise RunError(
                    f"{part.shards.path(0, part.shard)}: {_DEATHS} workers that held it died, the last: "
                    f"{reason_of(why)}; do they have memory enough? Give engine.cpus more "
                    "cores, so that fewer share a node"
                )
        members = self.team.members or [self.team.add()]
        rows: Counter[str] = Counter()
        for number, owner in self._owner.items():
            rows[owner.name] += len(self.parts[number].rows)
        given: dict[int, Member] = {}
        for number in orphans:
            given[number] = min(members, key=lambda one: rows[one.name])
            rows[given[number].name] += len(self.parts[number].rows)
        self._assign(given)

    def _was_told(self, number: int) -> bool:
        """Whether the owner of a part, which has died since, was alive when it was given it."""
        import ray
        from ray.exceptions import RayError

        try:
            ray.get(self._informed[number], timeout=0)
        except RayError:
            return False
        return True

    def _assign(self, given: dict[int, Member]) -> None:
        """Make members the owners; what they cannot open, they tell when they are asked."""
        for member, theirs in self._grouped([number for number in given if number in self._owner]):
            if member in self.team.members:
                member.actor.disown.remote(self.pool, theirs)
        self._owner.update(given)
        for member, mine in self._grouped(list(given)):
            told = member.actor.own.remote(self.pool, {number: self.parts[number] for number in mine})
            self._informed.update(dict.fromkeys(mine, told))
            for name in self._views:
                member.actor.see.remote(self.pool, name, self._view(name, mine))


def shares(sizes: Sequence[int], count: int) -> list[int]:
    """To which of `count` owners each part goes: neighbours together, nearly equal sums of sizes."""
    total, before, given = max(1, sum(sizes)), 0, []
    for size in sizes:
        given.append(min(count - 1, (before + size // 2) * count // total))
        before += size
    return given
