"""Pools of random rows in stores, and what one machine makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpursuit.cluster import ClusterFeatures, RayGradientMatrix
from gradpursuit.cluster.shards import Part
from gradpursuit.cluster.team import Team
from gradpursuit.features import TrajectoryFeatures
from gradpursuit.pursuit import GradientTrajectoryPursuit, TrajectoryMatrix
from gradpursuit.store import GradientStore, Shard, StoreSpec

FACTORS = np.array([[1.0], [0.5]])  # of the two checkpoints


class Pool:
    """240 rows of 30 numbers at two checkpoints, some repeated twice, so that scores tie; row 7 is left out."""

    def __init__(self, folder: Path, shard_rows: int = 23, dtype: str = "float16") -> None:
        rng = np.random.default_rng(3)
        rows = rng.standard_normal((2, 240, 30), dtype=np.float32)
        for copy in (1, 2):
            rows[:, copy:200:10] = rows[:, 0:200:10]
        spec = StoreSpec(tuple(f"row-{i}" for i in range(240)), 2, 30, dtype, shard_rows, {"made": "for tests"})
        self.store = GradientStore.create(folder, spec)
        for t in range(2):
            for s, where in enumerate(spec.shards()):
                one = np.ones(len(where), dtype=np.float32)
                number = np.arange(where.start, where.stop)
                shard = Shard(rows[t, where.start : where.stop], one, one, one.astype(np.int32), number)
                self.store.write(t, s, shard)
        self.rows = np.delete(np.arange(240), 7)
        self.target = rng.standard_normal(60) + rows[:, 40:60].mean(axis=1).ravel()

    def parts(self) -> list[Part]:
        """What workers are to own."""
        shards = self.store.spec.shards()
        return [
            Part(self.store.shards, s, self.rows[(self.rows >= where.start) & (self.rows < where.stop)])
            for s, where in enumerate(shards)
        ]

    def on(self, team: Team, owners: list[int] | None = None) -> RayGradientMatrix:
        """The matrix on workers."""
        features = ClusterFeatures(team, self.parts(), owners)
        return features.matrix(FACTORS / features.norms())

    def matrix(self) -> TrajectoryMatrix:
        """The matrix of one machine."""
        features = TrajectoryFeatures(self.store.features()).take(self.rows)
        return features.matrix(FACTORS / features.norms())

    def pursue(
        self, matrix: Any, callback: Callable[..., object] | None = None, **settings: Any
    ) -> GradientTrajectoryPursuit:
        """A pursuit of 24 rows; copies may be chosen, so that ties matter."""
        return GradientTrajectoryPursuit(24, **{"max_coherence": None, **settings}).fit(matrix, self.target, callback)


def same(found: GradientTrajectoryPursuit, expected: GradientTrajectoryPursuit) -> None:
    """The same support in the same order, and weights within 1e-5 of the largest."""
    np.testing.assert_array_equal(found.support_, expected.support_)
    np.testing.assert_array_equal(found.layers_, expected.layers_)
    weights: NDArray[np.float64] = expected.coef_
    np.testing.assert_allclose(found.coef_, weights, rtol=0, atol=1e-5 * weights.max())
    assert found.copies_ == expected.copies_
    assert found.stop_reason_ == expected.stop_reason_
