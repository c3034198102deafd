"""The model, what is trained of it, the warm-up run or one of your own, and the checkpoints that either leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradpursuit.trajectory.callback import GradientTrajectoryCallback
    from gradpursuit.trajectory.weighted import WeightedTrainer

__all__ = ["GradientTrajectoryCallback", "WeightedTrainer"]


def __getattr__(name: str) -> Any:
    if name == "GradientTrajectoryCallback":
        from gradpursuit.trajectory.callback import GradientTrajectoryCallback

        return GradientTrajectoryCallback
    if name == "WeightedTrainer":
        from gradpursuit.trajectory.weighted import WeightedTrainer

        return WeightedTrainer
    raise AttributeError(f"module 'gradpursuit.trajectory' has no attribute '{name}'")
