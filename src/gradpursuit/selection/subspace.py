"""The subspace that follows the trajectory: at every checkpoint the directions in which some features vary most."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from gradpursuit.features import TrajectoryFeatures

logger = logging.getLogger("gradpursuit")
SAMPLE = 2048  # rows whose singular vectors are taken of a larger set
_LEAST_ENERGY = 1e-10  # share of the largest squared singular value below which a direction is rounding

Basis = NDArray[np.float64]


def subspace(features: TrajectoryFeatures, rank: int) -> list[Basis]:
    """V_t [d, r]: at every checkpoint the top right singular vectors of the features, r at most `rank`.

    Of more than 2,048 rows, as many are taken at equal distances.
    """
    count = min(len(features), SAMPLE)
    rows = np.linspace(0, len(features) - 1, count).round().astype(np.int64)
    bases = [_directions(features.some(t, rows), rank) for t in range(features.checkpoints)]
    sizes = sorted({basis.shape[1] for basis in bases})
    logger.info("subspace of %s dimensions from %d rows", " to ".join(map(str, sizes)), count)
    return bases


def projected(features: TrajectoryFeatures, bases: list[Basis]) -> TrajectoryFeatures:
    """The features in the coordinates of the subspace: at checkpoint t, U_t V_t [n, r], float32 in memory."""
    return TrajectoryFeatures([[features.dot(t, basis).astype(np.float32)] for t, basis in enumerate(bases)])


def _directions(X: NDArray[np.float64], rank: int) -> Basis:
    """[d, r], orthonormal columns, by falling singular value of X [n, d]."""
    n = len(X)
    squares, U = eigh(X @ X.T, subset_by_index=[max(0, n - rank), n - 1])
    kept = squares > _LEAST_ENERGY * squares[-1]
    basis: Basis = (X.T @ U[:, kept] / np.sqrt(squares[kept]))[:, ::-1]
    return basis
