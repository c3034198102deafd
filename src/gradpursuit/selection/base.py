"""What a strategy is given, and what it gives back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradpursuit.config import GradientsSection, MatchingSection, PursuitSection
from gradpursuit.errors import SelectionError
from gradpursuit.features import TrajectoryFeatures, pursuit_problem
from gradpursuit.gradients.forward import Signal
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.pursuit import TrajectoryMatrix
from gradpursuit.selection.subspace import projected, subspace

if TYPE_CHECKING:
    from gradpursuit.data import Row
    from gradpursuit.selection.registry import Strategy

FeatureKind = Preconditioner | Signal
Made = TypeVar("Made")


@dataclass(frozen=True)
class Selection:
    """The chosen examples, best first.

    Attributes:
        indices: int64 [k], positions in the pool, in the order of rank.
        weights: float64 [k], mean 1.
        layers: int64 [k], from 1; above 1 for what was chosen after the pursuit had saturated.
        evidence: why and how well, as JSON values: stop reasons, residuals, budgets.
        path: what smaller budgets buy of the same choice, the smallest first; empty if the rows stand in an order
            whose beginnings are the smaller budgets.
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float64]
    layers: NDArray[np.int64]
    evidence: dict[str, Any] = field(default_factory=dict)
    path: tuple[Selection, ...] = ()

    def within(self, candidates: NDArray[np.int64]) -> Selection:
        """The same selection, made of the rows at `candidates`, by their positions in the pool."""
        smaller = tuple(kept.within(candidates) for kept in self.path)
        return replace(self, indices=candidates[self.indices], path=smaller)

    @classmethod
    def ranked(cls, indices: Sequence[int] | NDArray[np.int64], evidence: dict[str, Any] | None = None) -> Selection:
        """A selection without weights: all 1, one layer."""
        chosen = np.asarray(indices, dtype=np.int64)
        return cls(chosen, np.ones(len(chosen)), np.ones(len(chosen), dtype=np.int64), evidence or {})

    @classmethod
    def best(cls, scores: NDArray[np.float64], k: int) -> Selection:
        """The `k` highest of `scores` [N]; equal scores in pool order."""
        chosen = np.argsort(-scores, kind="stable")[:k]
        return cls.ranked(chosen, {"scores": scores[chosen].tolist()})


@dataclass(frozen=True)
class Settings:
    """What strategies go by: sections of the configuration, and the options of single strategies by name."""

    gradients: GradientsSection = field(default_factory=GradientsSection)
    pursuit: PursuitSection = field(default_factory=PursuitSection)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def strategy(self, name: str) -> Strategy:
        """The strategy of that name, with its options.

        Raises:
            ConfigError: there is none, or its options are not usable.
        """
        from gradpursuit.selection.registry import strategy

        return strategy(name, self.options)


@dataclass(frozen=True)
class Needs:
    """The signals that a strategy reads; what no strategy needs is not computed.

    Attributes:
        features: kinds of features of the pool; the target's follow from them.
        text: whether it reads what the rows say.
        target: what it asks of the target: its single "rows", only their "mean" (so that the pool can be its own
            target), or "none".
        passes: how often it reads all features of the pool, at most; "k": once for each example that it chooses.
    """

    features: tuple[FeatureKind, ...] = ()
    text: bool = False
    target: Literal["none", "mean", "rows"] = "rows"
    passes: int | Literal["k"] = 1

    def __str__(self) -> str:
        gradients = ", ".join(kind.label for kind in self.features if isinstance(kind, Preconditioner))
        named = [f"gradients ({gradients})"] if gradients else []
        named += [kind.label for kind in self.features if isinstance(kind, Signal)]
        return ", ".join([*named, *(["text"] if self.text else [])]) or "nothing"


@dataclass(frozen=True)
class SelectionProblem:
    """What there is to choose from, and for whom.

    Attributes:
        ids: of the N pool rows.
        pool: features of the pool by label.
        target: features of the target by label; those of the pool if it is its own target.
        groups: group of each of the M target rows, numbered from 0.
        rates: float64 [T], learning rate η_t of each checkpoint.
        gradients: which preconditioner the pursuit uses.
        pursuit: settings of the pursuit.
        options: of single strategies, by name.
        rows: the N pool rows: tokens, labels, source, original columns.
        target_rows: the M target rows; none if the pool is its own target.
        text: gives what a row says, without the chat template; None if no strategy of the run needs it.
    """

    ids: Sequence[str]
    pool: Mapping[str, TrajectoryFeatures]
    target: Mapping[str, TrajectoryFeatures]
    groups: NDArray[np.int64]
    rates: NDArray[np.float64]
    gradients: GradientsSection
    pursuit: PursuitSection
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    target_rows: Sequence[Row] = ()
    text: Callable[[Row], str] | None = None
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def settings(self) -> Settings:
        """The settings as one object."""
        return Settings(self.gradients, self.pursuit, self.options)

    def once(self, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What `make` gives, made at the first call with this key alone: several budgets and draws share it."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def matching(
        self, preconditioner: str | None = None, settings: MatchingSection | None = None, *, per_group: bool = False
    ) -> tuple[TrajectoryMatrix, NDArray[np.float64]]:
        """A [D, N] and b [D] of the pursuit (arXiv 2410.16710), or with `per_group` b [D, q].

        Args:
            preconditioner: label; None: that of the section `gradients`.
            settings: None: the section `pursuit`.
            per_group: one target for each group, instead of the mean of their means.
        """
        settings = settings or self.pursuit
        kind = Preconditioner.labelled(preconditioner or self.gradients.preconditioner)  # type: ignore[arg-type]
        pool, target = self._in_subspace(kind, settings)
        measured = {"unit": pool, "unit-before": self.pool[kind.label], "none": None}[settings.normalize]
        return pursuit_problem(
            pool,
            target.group_means(self.groups) if per_group else target.group_mean(self.groups),
            self.rates_of(settings.checkpoints),
            norms=None if measured is None else measured.norms(),
            balance=settings.balance,
        )

    def rates_of(self, checkpoints: Sequence[int] | None) -> NDArray[np.float64]:
        """The learning rates, zero where a checkpoint does not count."""
        if checkpoints is None:
            return self.rates
        if max(checkpoints) > len(self.rates):
            raise SelectionError(
                f"pursuit.checkpoints: there is no checkpoint {max(checkpoints)}; the trajectory has "
                f"{len(self.rates)}, numbered from 1"
            )
        counts = np.isin(np.arange(1, len(self.rates) + 1), checkpoints)
        return np.where(counts, self.rates, 0.0)

    def _in_subspace(
        self, kind: Preconditioner, settings: MatchingSection
    ) -> tuple[TrajectoryFeatures, TrajectoryFeatures]:
        pool, target = self.pool[kind.label], self.target[kind.for_target.label]
        if settings.subspace == "none":
            return pool, target

        def project() -> tuple[TrajectoryFeatures, TrajectoryFeatures]:
            bases = subspace(target if settings.subspace == "target" else pool, settings.rank)
            return projected(pool, bases), projected(target, bases)

        return self.once(("projected", kind, settings.subspace, settings.rank), project)


class Method(Protocol):
    """One way of choosing.

    It is a callable that takes its options by name, each with a default, and gives an object with the attributes below:
    a :class:`~gradpursuit.config.Section` (its fields are the options), a data class, or any other class.

    Attributes:
        source: the paper it follows.
        stochastic: whether its choice depends on the seed.
    """

    source: Any
    stochastic: Any

    def needs(self, settings: Settings) -> Needs:
        """The signals it reads."""

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """Choose at most `k` of the pool; `seed` matters to stochastic strategies alone."""


def derive_seed(seed: int, use: str) -> int:
    """A seed for one use, in [0, 2³¹), so that no two uses share a stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{use}".encode()).digest()[:4], "little") >> 1
