"""Pursuit: choose a few columns of a gradient matrix whose non-negative combination matches a target.

Numbers only: arrays, tensors or any :class:`GradientMatrix`; no models, texts or files. The estimators
follow the conventions of scikit-learn::

    pursuit = GradientTrajectoryPursuit(n_nonzero_coefs=100).fit(A, b)  # A [D, N], b [D]
    pursuit.support_, pursuit.coef_[pursuit.support_], pursuit.residual_path_
"""

from gradpursuit.pursuit.gtp import GradientTrajectoryPursuit
from gradpursuit.pursuit.joined import JoinedMatrix
from gradpursuit.pursuit.loop import PursuitStep
from gradpursuit.pursuit.matrix import DenseMatrix, GradientMatrix, TrajectoryMatrix, as_matrix
from gradpursuit.pursuit.mp import MatchingPursuit
from gradpursuit.pursuit.nnls import NNLSResult, kkt_violation, nnls
from gradpursuit.pursuit.omp import GradMatch, NonNegativeOMP
from gradpursuit.pursuit.path import BudgetPath, Knee, Subset
from gradpursuit.pursuit.tensor import TensorMatrix

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
