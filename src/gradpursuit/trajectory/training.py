"""Fine-tuning an adapter or layers with `transformers.Trainer`, for the warm-up and for evaluation alike."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from gradpursuit.data import Row
from gradpursuit.errors import TrajectoryError
from gradpursuit.progress import Progress
from gradpursuit.trajectory.model import Compute
from gradpursuit.trajectory.passes import Passes
from gradpursuit.trajectory.threads import side_by_side

logger = logging.getLogger("gradpursuit")


@dataclass(frozen=True)
class TrainSpec:
    """How to train: AdamW (no weight decay), linear decay after 3 % warm-up, `steps` batches of `batch_size`.

    No step has a learning rate of zero: the first uses 1 / (warm-up steps) of the peak, and the decay ends after the
    last.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    what: str

    @classmethod
    def for_epochs(
        cls, rows: int, epochs: int, batch_size: int, learning_rate: float, seed: int, what: str
    ) -> TrainSpec:
        """The spec whose steps make `epochs` passes over `rows` examples."""
        return cls(epochs * math.ceil(rows / batch_size), batch_size, learning_rate, seed, what)


@dataclass(frozen=True)
class TrainingRow:
    """What a step reads of a row, and the weight of its loss."""

    input_ids: list[int]
    labels: list[int]
    weight: float


class SupervisedTrainer(Trainer):
    """A Trainer whose loss is the weighted mean of the per-example mean losses of a batch.

    On a CPU, threads compute parts of a batch side by side; the gradient is that of the whole batch, but for the order
    of sums.
    """

    def __init__(self, model: nn.Module, passes: Passes, **options: Any) -> None:
        super().__init__(model=model, data_collator=lambda rows: {"rows": rows}, **options)
        self._passes = passes

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Linear rise and decay, above zero at every step."""
        rise = max(1, round(0.03 * num_training_steps))

        def factor(step: int) -> float:
            fall = (num_training_steps - step) / (num_training_steps - rise + 1)
            return max(0.0, min((step + 1) / rise, fall))

        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None  # the Trainer makes it first
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Set the gradients of the mean over the batch of weight × mean negative log-likelihood of a row's supervised
        tokens; return that mean."""
        model.train()
        rows: list[TrainingRow] = inputs["rows"]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parts = self._passes.parts(rows)

        def work(part: int) -> tuple[Tensor, Sequence[Tensor | None]]:
            own = [rows[i] for i in parts[part]]
            nll = self._passes.predict(own).losses()
            loss = (torch.tensor([row.weight for row in own]).to(nll) * nll).sum() / len(rows)
            return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

        losses = []
        for loss, gradients in side_by_side(work, len(parts)):
            losses.append(loss)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        total = torch.stack(losses).sum()
        if not total.isfinite():
            raise TrajectoryError(
                f"the training loss is {total.item():g} at step {self.state.global_step + 1}: training has diverged, "
                "or the model's weights or a row are broken; lower warmup.learning_rate or evaluation.learning_rate, "
                "or try model.precision: float32"
            )
        return total

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0


def train(
    model: nn.Module,
    rows: Sequence[Row],
    spec: TrainSpec,
    compute: Compute,
    *,
    weights: Sequence[float] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> float:
    """Train the trainable parameters of `model` in place and return the mean training loss.

    Args:
        model: with a trainable adapter or trainable layers.
        rows: training examples; every epoch shuffles them anew from the seed.
        spec: steps, batch size, learning rate, seed.
        compute: device and precision.
        weights: one factor per row for its loss; None means 1.
        callbacks: of the Trainer, beside the one that shows progress.
    """
    weights = [1.0] * len(rows) if weights is None else weights
    data = [TrainingRow(r.input_ids, r.labels, float(w)) for r, w in zip(rows, weights, strict=True)]

    with tempfile.TemporaryDirectory() as scratch, Progress(spec.what, spec.steps, "steps") as progress:
        passes = Passes(model, compute)
        trainer = SupervisedTrainer(
            model,
            passes,
            args=_arguments(spec, scratch, compute),
            train_dataset=data,
            callbacks=[*callbacks, _ProgressCallback(progress)],
        )
        trainer.remove_callback(PrinterCallback)
        with passes.quick():
            result = trainer.train()
    model.eval()
    return float(result.training_loss)


class _ProgressCallback(TrainerCallback):
    """Shows one step after the other."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.update()


def _arguments(spec: TrainSpec, folder: str, compute: Compute) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        weight_decay=0.0,
        seed=spec.seed,
        use_cpu=compute.device.type == "cpu",
        optim="adamw_torch",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=compute.device.type == "cuda",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible GPUs would split and enlarge the batch
    return arguments
