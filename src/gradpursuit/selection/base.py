"""What a strategy is given, and what it gives back."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gradpursuit.config import GradientsSection, PursuitSection
from gradpursuit.errors import ConfigError, nearest
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.pursuit import TrajectoryMatrix
from gradpursuit.selection.features import TrajectoryFeatures, pursuit_problem


@dataclass(frozen=True)
class Selection:
    """The chosen examples, best first.

    Attributes:
        indices: int64 [k], positions in the pool, in the order of rank.
        weights: float64 [k], mean 1.
        layers: int64 [k], from 1; above 1 for what was chosen after the pursuit had saturated.
        evidence: why and how well, as JSON values: stop reasons, residuals, the path.
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float64]
    layers: NDArray[np.int64]
    evidence: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def ranked(cls, indices: Sequence[int] | NDArray[np.int64], evidence: dict[str, Any] | None = None) -> Selection:
        """A selection without weights: all 1, one layer."""
        chosen = np.asarray(indices, dtype=np.int64)
        return cls(chosen, np.ones(len(chosen)), np.ones(len(chosen), dtype=np.int64), evidence or {})


@dataclass(frozen=True)
class SelectionProblem:
    """What there is to choose from, and for whom.

    Attributes:
        ids: of the N pool rows.
        pool: features of the pool by preconditioner label.
        target: features of the target by preconditioner label.
        groups: group of each of the M target rows, numbered from 0.
        rates: float64 [T], learning rate η_t of each checkpoint.
        gradients: which preconditioner the pursuit uses.
        pursuit: settings of the pursuit.
    """

    ids: Sequence[str]
    pool: dict[str, TrajectoryFeatures]
    target: dict[str, TrajectoryFeatures]
    groups: NDArray[np.int64]
    rates: NDArray[np.float64]
    gradients: GradientsSection
    pursuit: PursuitSection

    def matching(self) -> tuple[TrajectoryMatrix, NDArray[np.float64]]:
        """A [D, N] and b [D] of the pursuit (arXiv 2410.16710), by the configured features and normalisation."""
        kind = Preconditioner(self.gradients.preconditioner)
        return pursuit_problem(
            self.pool[kind.label],
            self.target[kind.for_target.label].group_mean(self.groups),
            self.rates,
            unit=self.pursuit.normalize == "unit",
            balance=self.pursuit.balance,
        )


class Strategy(Protocol):
    """One way of choosing. A strategy is a class without arguments, in a module of its own."""

    name: str
    source: str
    stochastic: bool

    def needs(self, gradients: GradientsSection) -> list[Preconditioner]:
        """The pool features it reads; the target's follow from them."""

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """Choose at most `k` of the pool; `seed` matters to stochastic strategies alone."""


STRATEGIES = {
    "gtp": "gradpursuit.selection.gtp:GTP",
    "omp": "gradpursuit.selection.omp:OMP",
    "less": "gradpursuit.selection.less:LESS",
    "random": "gradpursuit.selection.random:Random",
}


def strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"unknown strategy '{name}'; {nearest(name, STRATEGIES)}")
    module, _, attribute = STRATEGIES[name].partition(":")
    made: Strategy = getattr(importlib.import_module(module), attribute)()
    return made


def derive_seed(seed: int, use: str) -> int:
    """A seed for one use, in [0, 2³¹), so that no two uses share a stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{use}".encode()).digest()[:4], "little") >> 1
