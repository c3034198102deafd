"""The warm-up: a short training run on a slice of the pool that leaves its checkpoints behind."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import numpy as np
from torch import nn

from gradpursuit.config import WarmupSection
from gradpursuit.data import Table
from gradpursuit.errors import ConfigError
from gradpursuit.files import write_json
from gradpursuit.trajectory.callback import GradientTrajectoryCallback
from gradpursuit.trajectory.checkpoint import Checkpoint, read_trajectory
from gradpursuit.trajectory.model import Compute
from gradpursuit.trajectory.training import TrainSpec, train

logger = logging.getLogger("gradpursuit")


def warmup_plan(config: WarmupSection, pool: int, seed: int) -> tuple[int, TrainSpec]:
    """How many rows of a pool of `pool` rows the warm-up trains on, and how.

    Raises:
        ConfigError: there are fewer optimizer steps than checkpoints.
    """
    count = max(1, math.ceil(config.fraction * pool))
    spec = TrainSpec.for_epochs(count, config.epochs, config.batch_size, config.learning_rate, seed, "warm-up training")
    if spec.steps < config.checkpoints:
        raise ConfigError(
            f"warmup.checkpoints = {config.checkpoints}, but {count} rows × {config.epochs} epochs at batch size "
            f"{config.batch_size} make only {spec.steps} steps; raise warmup.fraction or warmup.epochs"
        )
    return count, spec


def warm_up(
    model: nn.Module, pool: Table, config: WarmupSection, compute: Compute, folder: Path, seed: int
) -> list[Checkpoint]:
    """Train on a seeded slice of the pool and keep T checkpoints, evenly spaced, the last at the end.

    Args:
        model: with a fresh adapter or with trainable layers, trained in place.
        pool: the cleaned pool; `config.fraction` of its rows are used.
        config: fraction, epochs, checkpoints, batch size, learning rate.
        compute: device and precision.
        folder: gets `checkpoint-1` ... `checkpoint-T` and `slice.json`, the ids trained on.
        seed: draws the slice and the order of training.

    Raises:
        ConfigError: there are fewer optimizer steps than checkpoints.
    """
    count, spec = warmup_plan(config, len(pool), seed)
    chosen = sorted(int(i) for i in np.random.default_rng(seed).permutation(len(pool))[:count])
    for earlier in folder.glob("checkpoint-*"):
        shutil.rmtree(earlier)  # of another run: what is read back below must be of this one alone
    follow = GradientTrajectoryCallback(folder, config.checkpoints)
    train(model, pool.take(chosen), spec, compute, callbacks=[follow])
    write_json(folder / "slice.json", {"ids": [pool[i].id for i in chosen], "steps": spec.steps})
    return read_trajectory(folder)
