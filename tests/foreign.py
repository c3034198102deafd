"""Training runs as users have them: the real Trainer, whose optimizer is watched at every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from gradpursuit.trajectory.model import trainable


def examples(count: int = 8, length: int = 6) -> list[dict[str, Tensor]]:
    """Rows of random tokens of one length."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(3, 60, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]


class Watch(TrainerCallback):
    """Copies of weights, moments and learning rates, by step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.moments: dict[int, dict[str, dict[str, Tensor]]] = {}
        self.rates: dict[int, float] = {}
        self._rate = 0.0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._rate = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters, optimizer = trainable(kwargs["model"]), kwargs["optimizer"].optimizer
        step = state.global_step
        self.rates[step] = self._rate
        self.weights[step] = {name: p.detach().clone() for name, p in parameters.items()}
        self.moments[step] = {
            name: {key: torch.as_tensor(value).clone() for key, value in optimizer.state[p].items()}
            for name, p in parameters.items()
        }


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    """Settings of a run of six steps, saved every two."""
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "warmup_steps": 2,
        **settings,
    }


def run_trainer(
    model: Any, folder: Path, callbacks: Sequence[TrainerCallback] = (), resume: str | None = None, **settings: Any
) -> Watch:
    """Train with the plain Trainer."""
    watch = Watch()
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(folder, **settings)),
        train_dataset=examples(),
        callbacks=[*callbacks, watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return watch


def assert_same_moments(adam: Any, moments: dict[str, dict[str, Tensor]]) -> None:
    """The state read is the state that was."""
    assert set(adam.m) == set(adam.v) == set(moments)
    assert any(kept["exp_avg_sq"].any() for kept in moments.values())
    for name, kept in moments.items():
        assert torch.equal(adam.m[name], kept["exp_avg"]), name
        assert torch.equal(adam.v[name], kept["exp_avg_sq"]), name
        assert adam.step == int(kept["step"])
