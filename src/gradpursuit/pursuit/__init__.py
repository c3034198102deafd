"""Pursuit: choose a few columns of a gradient matrix whose non-negative combination matches a target.

Numbers only: arrays, tensors or any :class:`GradientMatrix`; no models, texts or files. The estimators
follow the conventions of scikit-learn::

    pursuit = GradientTrajectoryPursuit(n_nonzero_coefs=100).fit(A, b)  # A [D, N], b [D]
    pursuit.support_, pursuit.coef_[pursuit.support_], pursuit.residual_path_

The estimators are loaded at first use: who only multiplies, as workers do, need not wait for scikit-learn.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gradpursuit.pursuit.joined import JoinedMatrix
from gradpursuit.pursuit.loop import PursuitStep
from gradpursuit.pursuit.matrix import DenseMatrix, GradientMatrix, TrajectoryMatrix, as_matrix
from gradpursuit.pursuit.nnls import NNLSResult, kkt_violation, nnls
from gradpursuit.pursuit.path import BudgetPath, Knee, Subset
from gradpursuit.pursuit.tensor import TensorMatrix

if TYPE_CHECKING:
    from gradpursuit.pursuit.gtp import GradientTrajectoryPursuit
    from gradpursuit.pursuit.mp import MatchingPursuit
    from gradpursuit.pursuit.omp import GradMatch, NonNegativeOMP

_ESTIMATORS = {"GradMatch": "omp", "GradientTrajectoryPursuit": "gtp", "MatchingPursuit": "mp", "NonNegativeOMP": "omp"}

__all__ = [
    "BudgetPath",
    "DenseMatrix",
    "GradMatch",
    "GradientMatrix",
    "GradientTrajectoryPursuit",
    "JoinedMatrix",
    "Knee",
    "MatchingPursuit",
    "NNLSResult",
    "NonNegativeOMP",
    "PursuitStep",
    "Subset",
    "TensorMatrix",
    "TrajectoryMatrix",
    "as_matrix",
    "kkt_violation",
    "nnls",
]


def __getattr__(name: str) -> Any:
    if name in _ESTIMATORS:
        return getattr(importlib.import_module(f"gradpursuit.pursuit.{_ESTIMATORS[name]}"), name)
    raise AttributeError(f"module 'gradpursuit.pursuit' has no attribute '{name}'")
