"""The warm-up: a short training run on a slice of the pool that leaves its checkpoints behind."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradpursuit.config import WarmupSection
from gradpursuit.data import Table
from gradpursuit.errors import ConfigError
from gradpursuit.files import require_space, write_json
from gradpursuit.trajectory.checkpoint import Checkpoint, read_trajectory, write_checkpoint
from gradpursuit.trajectory.model import Compute, trainable
from gradpursuit.trajectory.training import TrainSpec, train

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger("gradpursuit")


def warm_up(
    model: PeftModel, pool: Table, config: WarmupSection, compute: Compute, folder: Path, seed: int
) -> list[Checkpoint]:
    """Train on a seeded slice of the pool and keep T checkpoints, evenly spaced, the last at the end.

    Args:
        model: with a fresh adapter, trained in place.
        pool: the cleaned pool; `config.fraction` of its rows are used.
        config: fraction, epochs, checkpoints, batch size, learning rate.
        compute: device and precision.
        folder: gets `checkpoint-1` ... `checkpoint-T` and `slice.json`, the ids trained on.
        seed: draws the slice and the order of training.

    Raises:
        ConfigError: there are fewer optimizer steps than checkpoints.
    """
    count = max(1, math.ceil(config.fraction * len(pool)))
    chosen = sorted(int(i) for i in np.random.default_rng(seed).permutation(len(pool))[:count])
    spec = TrainSpec.for_epochs(count, config.epochs, config.batch_size, config.learning_rate, seed, "warm-up training")
    if spec.steps < config.checkpoints:
        raise ConfigError(
            f"warmup.checkpoints = {config.checkpoints}, but {count} rows × {config.epochs} epochs at batch size "
            f"{config.batch_size} make only {spec.steps} steps; raise warmup.fraction or warmup.epochs"
        )
    size = sum(parameter.numel() for parameter in trainable(model).values())
    require_space(folder, 12 * size * config.checkpoints, "the warm-up")
    keep = {
        round(spec.steps * t / config.checkpoints): folder / f"checkpoint-{t}" for t in range(1, config.checkpoints + 1)
    }
    for earlier in folder.glob("checkpoint-*"):
        shutil.rmtree(earlier)  # of another run: what is read back below must be of this one alone
    rates: list[float] = []

    def on_step(step: int, optimizer: torch.optim.Optimizer, rate: float) -> None:
        rates.append(rate)
        if step in keep:
            state = {"step": step, "learning_rate": float(np.mean(rates))}
            write_checkpoint(keep[step], model, optimizer, state)
            rates.clear()

    train(model, pool.take(chosen), spec, compute, on_step=on_step)
    write_json(folder / "slice.json", {"ids": [pool[i].id for i in chosen], "steps": spec.steps})
    return read_trajectory(folder)
