"""Batches of rows, and their per-example loss with logits only where there is a label."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpursuit.data import IGNORE
from gradpursuit.errors import ModelError
from gradpursuit.trajectory.model import Compute


def collate(rows: Sequence[Any], pad_id: int, width: int = 0) -> dict[str, Tensor]:
    """Right-pad rows with `input_ids` and `labels` to `input_ids`, `attention_mask`, `labels`, each [B, L] int64.

    Causal attention never looks to the right, so padding there changes no supervised token's result. L is the
    :func:`padded_width` of the longest row, and `width` at least.
    """
    width = max(width, *(padded_width(len(row.input_ids)) for row in rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        ids[i, :length] = torch.tensor(row.input_ids)
        labels[i, :length] = torch.tensor(row.labels)
        mask[i, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def padded_width(length: int) -> int:
    """The least width of a batch that holds a row of `length` tokens: a multiple of 8, eight of them to an octave.

    Products in bfloat16 on a processor (oneDNN) leave a megabyte or two of machine code behind for every shape that
    they meet, and never let go of it: batches of any width would fill the memory with it.
    """
    step = max(8, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // step) * step


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices grouped by length so that a batch, padded, holds at most `budget` tokens (or one row).

    The grouping depends on the lengths alone; rows of one length keep their order.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * padded_width(lengths[index]) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@dataclass(frozen=True)
class Predictions:
    """What a model says of the n supervised tokens of a batch of B rows.

    Attributes:
        logits: [n, V] float32.
        targets: [n], the tokens that were to be predicted.
        row: [n], the row of the batch that each belongs to.
        tokens: [B], supervised tokens of each row.
        hidden: [B, L, H], what reaches the output layer at all positions.
    """

    logits: Tensor
    targets: Tensor
    row: Tensor
    tokens: Tensor
    hidden: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Of `values [n]`, one for each token, the mean over the tokens of each row: [B] float32."""
        total = torch.zeros(len(self.tokens), device=values.device, dtype=torch.float32)
        return total.index_add(0, self.row, values) / self.tokens

    def losses(self) -> Tensor:
        """Mean negative log-likelihood of each row's supervised tokens: [B] float32."""
        return self.mean(F.cross_entropy(self.logits, self.targets, reduction="none"))

    def likely(self) -> list[list[int]]:
        """The most likely token at every supervised position of each row, given all before it."""
        found = self.logits.argmax(dim=-1).cpu().split(self.tokens.tolist())
        return [row.tolist() for row in found]


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
        found = self.predict(batch)
        return found.losses(), found.tokens

    def predict(self, batch: Mapping[str, Tensor]) -> Predictions:
        """What the model says of a collated or packed batch, which is moved to the device."""
        device = self._compute.device
        given = {name: value.to(device) for name, value in batch.items()}
        if "targets" in given:
            targets, row = given["targets"], given["row"]
            wanted = targets != IGNORE
            row = row[wanted]
        else:
            targets = F.pad(given["labels"][:, 1:], (0, 1), value=IGNORE)  # [B, L]: what position l predicts
            wanted = targets != IGNORE
            row = wanted.nonzero()[:, 0]
        inputs = {name: given[name] for name in ("input_ids", "attention_mask", "position_ids") if name in given}
        with self._only(wanted) as reached, self._compute.precision():
            logits = self._model(**inputs, use_cache=False).logits[0]  # [n, V]
        count = int(given["row"].max()) + 1 if "row" in given else len(wanted)
        return Predictions(logits.float(), targets[wanted], row, torch.bincount(row, minlength=count), reached[0])

    @contextmanager
    def _only(self, wanted: Tensor) -> Iterator[list[Tensor]]:
        """Logits at the `wanted` positions alone; what reached the output layer is put into the list."""
        reached: list[Tensor] = []
        caller = threading.get_ident()  # other threads may be at their own batches

        def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if threading.get_ident() != caller:
                return None
            reached.append(args[0])
            return (args[0][wanted].unsqueeze(0), *args[1:])

        handle = self._head.register_forward_pre_hook(select)
        try:
            yield reached
        finally:
            handle.remove()
