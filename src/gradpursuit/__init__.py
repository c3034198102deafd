"""gradpursuit: pick training examples jointly, by following gradients along a warm-up trajectory.

Importing this package is cheap; the names below load their modules on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "GradientTrajectoryCallback": "gradpursuit.trajectory",
    "GradientTrajectoryPursuit": "gradpursuit.pursuit",
    "NonNegativeOMP": "gradpursuit.pursuit",
    "GradPursuitError": "gradpursuit.errors",
    "RunConfig": "gradpursuit.config",
    "WeightedTrainer": "gradpursuit.trajectory",
}

__all__ = [
    "GradPursuitError",
    "GradientTrajectoryCallback",
    "GradientTrajectoryPursuit",
    "NonNegativeOMP",
    "RunConfig",
    "WeightedTrainer",
    "__version__",
]

if TYPE_CHECKING:
    from gradpursuit.config import RunConfig
    from gradpursuit.errors import GradPursuitError
    from gradpursuit.pursuit import GradientTrajectoryPursuit, NonNegativeOMP
    from gradpursuit.trajectory import GradientTrajectoryCallback, WeightedTrainer


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gradpursuit' has no attribute '{name}'")
