"""How well chosen rows explain a target: computed again from the stored features, as the pursuit weighs them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradpursuit.features import TrajectoryFeatures, pursuit_problem
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.pursuit import nnls
from gradpursuit.selection import SelectionProblem
from gradpursuit.selection_problem import load_problem
from gradpursuit.sources import short_names

if TYPE_CHECKING:
    from gradpursuit.data import Row
    from gradpursuit.pipeline import Run

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
PASS_BYTES = 2 << 30  # features that a report reads in a pass of its own without being asked
COLUMN_BYTES = 64 << 20  # features of chosen rows that it holds in memory without being asked


@dataclass(frozen=True)
class Match:
    """Some pool rows beside one target, every checkpoint scaled as in the pursuit.

    columns: A [D, m]; target: b [D]; examples: B [D, M], whose mean over groups of group means is b; blocks: the
    slice of D that each of the T checkpoints has; ridge: λ of the pursuit.
    """

    columns: Array
    target: Array
    examples: Array
    blocks: list[slice]
    ridge: float

    def refit(self) -> Array:
        """The best non-negative weights of the rows for this target, float64 [m]."""
        return nnls(self.columns.T @ self.columns, self.columns.T @ self.target, ridge=self.ridge).x

    def residual(self, weights: Array) -> float:
        """‖b − A w‖ / ‖b‖."""
        return float(np.linalg.norm(self.target - self.columns @ weights) / np.linalg.norm(self.target))


class Explainer:
    """The features of a run for the target that is chosen for, and what rows explain of it.

    Args:
        run: whose gradients are collected.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._problem, self._candidates = load_problem(run, few=True)
        self._kind = Preconditioner(run.config.gradients.preconditioner)

    @property
    def available(self) -> bool:
        """Whether the features that a pursuit uses were collected: some strategies need none, or others."""
        return self._kind.label in self._problem.pool

    @property
    def label(self) -> str:
        """Of the features."""
        return self._kind.label

    @property
    def subspace(self) -> str:
        """The setting: what the pursuit's features were projected to; here they have all their dimensions."""
        return self._problem.pursuit.subspace

    @property
    def bytes(self) -> int:
        """Of the pool's features, as stored."""
        return self._features.nbytes

    def column_bytes(self, rows: int) -> int:
        """Of the features of that many rows in float64."""
        return 8 * rows * self._features.width

    @property
    def groups(self) -> Ints:
        """Group of every target example, numbered from 0 in the order of :attr:`group_names`."""
        return self._problem.groups[: len(self.target_rows)]

    @cached_property
    def target_rows(self) -> list[Row]:
        """The target examples that have features; none where the pool is its own target."""
        return list(self._problem.target_rows)

    @cached_property
    def source_names(self) -> dict[str, str]:
        """Of the target's sources, as people read them."""
        return short_names((row.source, row.file) for row in self.target_rows)

    @property
    def group_names(self) -> list[str]:
        """The names of the groups: where their examples come from."""
        return list(self.source_names.values())

    def match(self, indices: Ints, other: Explainer | None = None) -> Match:
        """The rows at `indices` (positions in the pool's table, ascending) beside the target, or that of `other`."""
        problem = self._problem
        goal = (other or self)._problem
        target = goal.target[self._kind.for_target.label]
        mean = target.group_mean(goal.groups)
        matrix, b = self._stack(problem, self._features.take(self._rows(indices)), mean)
        d = mean.shape[1]
        blocks = [slice(t * d, (t + 1) * d) for t in range(len(mean))]
        scale = [np.linalg.norm(b[block]) / np.linalg.norm(g) for block, g in zip(blocks, mean, strict=True)]
        single = (other or self).target_rows
        examples = np.concatenate([scale[t] * target.at(t).T if single else np.empty((d, 0)) for t in range(len(mean))])
        columns = np.asarray(matrix.columns(np.arange(len(indices))), dtype=np.float64)
        return Match(columns, b, examples, blocks, self._ridge(matrix, mean))

    def top(self, k: int) -> Ints:
        """Positions in the pool's table, ascending, of the `k` rows that correlate most with the target: one pass."""
        matrix, b = self._problem.matching()
        best = np.argsort(-matrix.correlate(b), kind="stable")[:k]
        return np.sort(self._candidates[best])

    @property
    def _features(self) -> TrajectoryFeatures:
        return self._problem.pool[self._kind.label]

    def _rows(self, indices: Ints) -> Ints:
        return np.searchsorted(self._candidates, indices)

    @staticmethod
    def _stack(problem: SelectionProblem, features: TrajectoryFeatures, mean: Array) -> Any:
        norms = None if problem.pursuit.normalize == "none" else features.norms()
        rates = problem.rates_of(problem.pursuit.checkpoints)
        return pursuit_problem(features, mean, rates, norms=norms, balance=problem.pursuit.balance)

    def _ridge(self, chosen: Any, mean: Array) -> float:
        """λ: `pursuit.alpha` times the mean squared length of the pool's rows; unit rows are all of one length."""
        if self._problem.pursuit.normalize != "none":
            return self._problem.pursuit.alpha * float(chosen.squared_norms().mean())
        matrix, _ = self._stack(self._problem, self._features, mean)
        return self._problem.pursuit.alpha * float(matrix.squared_norms().mean())


def alignment(weighted: Array, target: Array) -> float:
    """Cosine of the angle between two gradients; 0 where one of them is zero."""
    lengths = float(np.linalg.norm(weighted) * np.linalg.norm(target))
    return float(weighted @ target) / lengths if lengths else 0.0


def cosines(columns: Array, others: Array) -> Array:
    """Cosines [m, n] of the columns of A [D, m] and B [D, n]; 0 where one of them is zero."""
    return _unit(columns).T @ _unit(others)


def near_copies(columns: Array, coherence: float) -> int:
    """Columns of A [D, m] whose cosine with an earlier one is at least `coherence`."""
    found = np.triu(cosines(columns, columns), k=1) >= coherence
    return int(found.any(axis=0).sum())


def _unit(columns: Array) -> Array:
    lengths = np.linalg.norm(columns, axis=0)
    return columns / np.where(lengths > 0, lengths, 1.0)
