"""What a forward pass alone tells of rows: embeddings and prediction errors, kept in stores like gradients are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradpursuit.data import Row
from gradpursuit.gradients.engine import Batch, Features, RowEngine
from gradpursuit.trajectory.loss import Predictions, collate
from gradpursuit.trajectory.model import Compute
from gradpursuit.trajectory.passes import Passes

_LEAST_ERROR = 1e-6  # what float32 leaves of the error of a row that is predicted perfectly; a store holds no zeros


@dataclass(frozen=True)
class Signal:
    """Which, by name.

    * `embedding` [H]: mean of the last hidden states of all tokens, the one at position i (from 1) weighted by i, of
      the base model alone (SGPT, arXiv 2202.08904; RDS+, arXiv 2503.01807).
    * `el2n` [1]: ‖p − y‖₂, p the predicted distribution and y the token as a unit vector, mean over the supervised
      tokens (Paul, Ganguli, Dziugaite, arXiv 2107.07075; the mean over tokens: Marion et al., arXiv 2309.04564), of the
      base model and of every checkpoint. The losses of its store are thus those along the whole training run.
    """

    name: Literal["embedding", "el2n"]

    @property
    def label(self) -> str:
        """A name for folders."""
        return self.name

    @property
    def along(self) -> bool:
        """Whether it is computed at every checkpoint too, not of the base model alone."""
        return self.name == "el2n"

    @property
    def for_target(self) -> Signal | None:
        """What is computed of the target: its embeddings; of errors nothing."""
        return self if self.name == "embedding" else None

    def describe(self) -> dict[str, Any]:
        """What makes it what it is, as JSON values."""
        return {"signal": self.name}


EMBEDDING, EL2N = Signal("embedding"), Signal("el2n")


class ForwardEngine(RowEngine):
    """One signal of a model as it is at present; logits are computed only where there is a label.

    Args:
        model: a causal language model.
        compute: device and precision.
        signal: which.
        tokens_per_batch: padded tokens in one forward pass.
    """

    def __init__(self, model: nn.Module, compute: Compute, signal: Signal, tokens_per_batch: int) -> None:
        super().__init__(model, compute.device, tokens_per_batch)
        self.what = signal.name
        self._passes = Passes(model, compute)
        self._signal = signal
        head = model.get_output_embeddings()  # type: ignore[operator]
        self._width = 1 if signal == EL2N else int(head.weight.shape[1])

    @property
    def widths(self) -> list[int]:
        """One number, or the size of a hidden state."""
        return [self._width]

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The signal, losses and supervised tokens of rows in one forward pass, or on a CPU in one for each thread."""
        with self._passes.quick():
            return super().batch(rows)

    def _part(self, rows: Sequence[Row], width: int) -> Batch:
        with torch.inference_mode():
            if self._signal == EL2N:
                found = self._passes.predict(rows)
                values = _errors(found)
            else:
                batch = collate(rows, self._pad, width)  # every token counts
                found = self._passes.loss.predict(batch)
                values = _embeddings(found, batch["attention_mask"].to(self._device))
            return Batch([Features(values, values.norm(dim=1))], found.losses(), found.tokens)


def _embeddings(found: Predictions, mask: Tensor) -> Tensor:
    """[B, H] float32."""
    weights = mask.cumsum(dim=1) * mask  # 1 … L, and 0 where there is padding
    shares = (weights / weights.sum(dim=1, keepdim=True)).float()
    return torch.einsum("bl,blh->bh", shares, found.hidden.float())


def _errors(found: Predictions) -> Tensor:
    """[B, 1] float32."""
    p = found.logits.softmax(dim=1)
    of_target = p.gather(1, found.targets[:, None])[:, 0]
    squares = p.square().sum(dim=1) - 2 * of_target + 1
    return found.mean(squares.clamp_min(0).sqrt()).clamp_min(_LEAST_ERROR)[:, None]
