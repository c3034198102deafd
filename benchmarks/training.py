"""A training step of the package beside the same step in the model's own code.

    python benchmarks/training.py [--rounds 3] [--batch 8] [--steps 8] [--threads N]

SmolLM2-135M-Instruct with LoRA r = 8 on all linear layers, batches of the rows in rows.py, forward and backward pass
and AdamW. The variants take turns in every round:

* `stock`: padded rows, logits for every token, in the model's precision (bfloat16 autocast where that is fast);
* `labels`: the same with logits only where there is a label;
* `package`: what the warm-up and the comparison do. Rows share a sequence, their common beginning is computed once,
  frozen weights are cast once, layers are fused steps.

Last it prints how far the gradients of `labels` and `package` are from those in float32: 1 - cos.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rows import build_rows
from torch import Tensor

from gradpursuit.config import LoraSection, ModelSection
from gradpursuit.data import IGNORE, Row
from gradpursuit.quickstart.assets import cache_folder, smollm2
from gradpursuit.trajectory.loss import SupervisedLoss, collate
from gradpursuit.trajectory.model import Compute, attach_lora, load_model, trainable
from gradpursuit.trajectory.passes import Passes
from gradpursuit.trajectory.threads import side_by_side

Step = Callable[[Sequence[Row]], None]


class Variants:
    """One model, and its ways of making the gradients of a batch."""

    def __init__(self, model: Any, compute: Compute) -> None:
        self._model, self._compute = model, compute
        self._parameters = list(trainable(model).values())
        self.passes = Passes(model, compute)

    def stock(self, rows: Sequence[Row]) -> None:
        batch = collate(rows, 0)
        with self._compute.precision():
            logits = self._model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        logits, labels = logits[:, :-1].float(), batch["labels"][:, 1:]
        nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
        (nll.sum(dim=1) / (labels != IGNORE).sum(dim=1)).mean().backward()

    def labels(self, rows: Sequence[Row], compute: Compute | None = None) -> None:
        SupervisedLoss(self._model, compute or self._compute)(collate(rows, 0))[0].mean().backward()

    def package(self, rows: Sequence[Row]) -> None:
        parts = self.passes.parts(rows)

        def work(part: int) -> tuple[Tensor, ...]:
            losses = self.passes.predict([rows[i] for i in parts[part]]).losses()
            return torch.autograd.grad(losses.sum() / len(rows), self._parameters)

        for gradients in side_by_side(work, len(parts)):
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def timed(self, step: Step, batches: Sequence[Sequence[Row]]) -> float:
        """Seconds a step, with AdamW."""
        optimizer = torch.optim.AdamW(self._parameters, lr=0.0, weight_decay=0.0)
        start = time.perf_counter()
        for rows in batches:
            step(rows)
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - start) / len(batches)

    def gradient(self, step: Step, rows: Sequence[Row]) -> Tensor:
        """Of all parameters, flat, float64."""
        step(rows)
        found = torch.cat([p.grad.flatten().double() for p in self._parameters])  # type: ignore[union-attr]
        for parameter in self._parameters:
            parameter.grad = None
        return found


def main() -> None:
    """Print a line for every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="of a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    section = ModelSection(path=str(smollm2(cache_folder())), device="cpu")
    compute = Compute.of(section)
    model = attach_lora(load_model(section), LoraSection(r=8), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    rows = build_rows()
    batches = [rows[i : i + arguments.batch] for i in range(0, len(rows), arguments.batch)][: arguments.steps]
    variants = Variants(model, compute)
    steps: dict[str, Step] = {name: getattr(variants, name) for name in ("stock", "labels", "package")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}

    def quick(name: str) -> AbstractContextManager[None]:
        return variants.passes.quick() if name == "package" else nullcontext()

    for turn in range(arguments.rounds + 1):  # the first warms up
        wanted = batches if turn else batches[:2]
        for name, step in steps.items():
            with quick(name):
                found = variants.timed(step, wanted)
            if turn:
                seconds[name].append(found)
    best = np.median(seconds["package"])
    print(f"{compute}, {torch.get_num_threads()} threads, batches of {arguments.batch}, {len(batches)} steps a round")
    for name, values in seconds.items():
        middle, each = np.median(values), ", ".join(f"{v:.3f}" for v in values)
        print(f"{name:8s} {middle:.3f} s a step ({each}), {arguments.batch / middle:.1f} rows/s, {middle / best:.2f} x")
    exact = variants.gradient(lambda rows: variants.labels(rows, Compute(compute.device, None)), batches[0])
    for name in ("labels", "package"):
        with quick(name):
            error = 1 - float(F.cosine_similarity(variants.gradient(steps[name], batches[0]), exact, 0))
        print(f"{name:8s} 1 - cos of its gradient to that in float32: {error:.1e}")


if __name__ == "__main__":
    main()
