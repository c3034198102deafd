"""`tarot`: the nearest neighbours of all target rows alike, in a space where all directions vary alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.linalg import cholesky, solve_triangular

from gradpursuit.config import Number, Section
from gradpursuit.errors import SelectionError
from gradpursuit.features import TrajectoryFeatures
from gradpursuit.gradients.preconditioner import PreconditionerLabel
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.gtp import preconditioner_of

_ROWS = 1024  # read at a time

Array = NDArray[np.float64]


class TAROT(Section):
    """TAROT of fixed size (arXiv 2412.00420).

    Features are averaged over the checkpoints, centred and whitened together with the target's, and brought to unit
    length. Then every target row's nearest pool row is taken, then every one's second, and so on until k are chosen.

    Simplified: of the last ring, which may hold more rows than are left to choose, those nearest to their target row
    are taken (the authors: those with the largest potential in the optimal transport), there are no weights, and k
    is given (the authors also let the transport distance to held-out targets choose it).
    """

    source: ClassVar[str] = "Feng, Nie, Liu, Alahi, arXiv 2412.00420"
    stochastic: ClassVar[bool] = False

    preconditioner: PreconditionerLabel | None = Field(
        "identity", description="of the gradients; null: that of section gradients"
    )
    ridge: Number = Field(
        0.01,
        gt=0,
        description="added to the covariance before it is inverted, relative to its mean eigenvalue over the "
        "dimensions that the rows can span; a small one makes all rows equally far apart where rows are few",
    )

    def needs(self, settings: Settings) -> Needs:
        """Gradients, of single target rows."""
        return Needs((preconditioner_of(self.preconditioner, settings),), passes=3)  # mean, covariance, neighbours

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """`k` rows, ring by ring, the nearest of each ring first; equally near ones in pool order."""
        similar = problem.once(("tarot", self), lambda: self._similarities(problem))
        chosen, rings = nearest_rings(similar, k)
        return Selection.ranked(chosen, {"scores": similar[chosen].max(axis=1).tolist(), "rings": rings})

    def _similarities(self, problem: SelectionProblem) -> Array:
        """Cosines of whitened pool and target rows: [N, M]."""
        kind = preconditioner_of(self.preconditioner, problem.settings)
        return whitened_cosines(problem.pool[kind.label], problem.target[kind.for_target.label], self.ridge)


def whitened_cosines(pool: TrajectoryFeatures, target: TrajectoryFeatures, ridge: float) -> Array:
    """Cosines [N, M] of mean features, centred and whitened by the covariance of pool and target together.

    Raises:
        SelectionError: all rows are the same.
    """
    total = len(pool) + len(target)
    mean = sum(part.sum(axis=0) for rows in (pool, target) for part in _parts(rows)) / total
    covariance = sum((part - mean).T @ (part - mean) for rows in (pool, target) for part in _parts(rows)) / total
    d = len(covariance)
    level = np.trace(covariance) / min(d, total - 1)
    if not level > 0:
        raise SelectionError("tarot: all features of pool and target are the same, so no row is nearer than another")
    factor = cholesky(covariance + ridge * level * np.eye(d), lower=True)

    def white(part: Array) -> Array:
        moved = solve_triangular(factor, (part - mean).T, lower=True)
        return moved / np.maximum(np.linalg.norm(moved, axis=0), np.finfo(float).tiny)

    goals = np.concatenate([white(part) for part in _parts(target)], axis=1)
    return np.concatenate([white(part).T @ goals for part in _parts(pool)])


def _parts(features: TrajectoryFeatures) -> Iterator[Array]:
    """Mean over the checkpoints, some rows at a time: arrays [n, d]."""
    for start in range(0, len(features), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(features)))
        yield np.mean([features.some(t, rows) for t in range(features.checkpoints)], axis=0)


def nearest_rings(similar: Array, k: int) -> tuple[NDArray[np.int64], int]:
    """The `k` rows of [N, M] that are chosen, and how many rings of neighbours they take."""
    preferred = np.argsort(-similar, axis=0, kind="stable")
    chosen: list[int] = []
    taken = np.zeros(len(similar), dtype=bool)
    ring = 0
    while len(chosen) < k:
        best: dict[int, float] = {}
        for row, column in zip(preferred[ring].tolist(), range(similar.shape[1]), strict=True):
            if not taken[row]:
                best[row] = max(best.get(row, -np.inf), float(similar[row, column]))
        new = sorted(best, key=lambda row: (-best[row], row))[: k - len(chosen)]
        chosen += new
        taken[new] = True
        ring += 1
    return np.array(chosen, dtype=np.int64), ring
