"""Batches of rows, and their per-example loss with logits only where there is a label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpursuit.data import IGNORE
from gradpursuit.errors import ModelError
from gradpursuit.trajectory.model import Compute


def collate(rows: Sequence[Any], pad_id: int) -> dict[str, Tensor]:
    """Right-pad rows with `input_ids` and `labels` to `input_ids`, `attention_mask`, `labels`, each [B, L] int64.

    Causal attention never looks to the right, so padding there changes no supervised token's result.
    """
    width = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        ids[i, :length] = torch.tensor(row.input_ids)
        labels[i, :length] = torch.tensor(row.labels)
        mask[i, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped by length so that a batch, padded, holds at most `budget` tokens (or one row).

    The grouping depends on the lengths alone; rows of one length keep their order.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class SupervisedLoss:
    """Mean negative log-likelihood over the supervised tokens of each example.

    The hidden states that reach the model's output layer are cut down to the positions that predict a labelled
    token, so that no other logit is ever computed; whatever the model does to its logits still happens.

    Raises:
        ModelError: the model has no output embedding layer.
    """

    def __init__(self, model: nn.Module, compute: Compute) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ModelError(f"{type(model).__name__} has no output embeddings: not a causal language model")
        self._model, self._head, self._compute = model, head, compute

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`(nll [B] float32, tokens [B] int64)` of a collated batch, which is moved to the device."""
        logits, wanted, targets = self._logits(batch)
        return self._mean(logits, wanted, targets)

    def with_predictions(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, list[list[int]]]:
        """Beside that, the most likely token at every supervised position of each example, given all before it."""
        logits, wanted, targets = self._logits(batch)
        nll, tokens = self._mean(logits, wanted, targets)
        likely = logits.argmax(dim=-1).cpu().split(tokens.tolist())
        return nll, tokens, [row.tolist() for row in likely]

    @staticmethod
    def _mean(logits: Tensor, wanted: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        tokens = wanted.sum(dim=1)
        row = wanted.nonzero()[:, 0]
        total = torch.zeros(len(wanted), device=losses.device, dtype=torch.float32).index_add(0, row, losses)
        return total / tokens, tokens

    def _logits(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [n, V] of the n supervised tokens, row by row, where they are [B, L], and the tokens [n]."""
        device = self._compute.device
        labels = batch["labels"].to(device)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # [B, L]: what position l predicts
        wanted = targets != IGNORE
        with self._only(wanted), self._compute.precision():
            logits = self._model(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                use_cache=False,
            ).logits[0]
        return logits, wanted, targets[wanted]

    @contextmanager
    def _only(self, wanted: Tensor) -> Iterator[None]:
        def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0][wanted].unsqueeze(0), *args[1:])

        handle = self._head.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()
