"""A Trainer that uses the weights of a selection, and refuses what would lose them unseen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn, tensor
from transformers import Trainer

from gradpursuit.data import IGNORE
from gradpursuit.errors import ConfigError, DataError
from gradpursuit.trajectory.loss import collate
from gradpursuit.trajectory.model import pad_id

_PACKED = ("seq_lengths", "cu_seq_lens_q", "seq_idx", "position_ids")  # what tells rows in one sequence apart
_WHY_PACKING = (
    "several rows then share one sequence, and a weight belongs to one row; switch packing (and padding_free) off, or "
    "train on repeated.jsonl, which needs no weights"
)


class WeightedTrainer(Trainer):
    """A `transformers.Trainer` whose loss is the mean over the batch of weight × mean loss of a row's tokens.

    `WeightedTrainer(model=model, args=args, train_dataset=rows)` takes rows with `input_ids`, `labels` (-100 where
    nothing is to be learned) and `weight`. Every row counts by its weight alone, however long it is; with all weights 1
    it is trained as `gradpursuit compare` does. Without a `data_collator` rows are padded on the right. Rows for
    evaluation need no weight: those without one count 1.

    Args:
        model: a causal language model.
        args: of the Trainer; the column `weight` is kept whatever `remove_unused_columns` says.
        options: of the Trainer.

    Raises:
        DataError: the rows have no usable weights or labels: the column was dropped, or the rows are packed; also
            from a batch that a collator has made without them.
        ConfigError: packing, label smoothing or a loss of your own, which weights do not go with.
    """

    def __init__(self, model: nn.Module, args: Any = None, **options: Any) -> None:
        _refuse_settings(args, options)
        _refuse_rows(options.get("train_dataset"))
        options.setdefault("data_collator", _Collator(pad_id(model)))
        super().__init__(model=model, args=args, **options)
        self.model_accepts_loss_kwargs = False  # the loss is already a mean over the batch

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean over the batch of weight × mean negative log-likelihood of the supervised tokens."""
        rest = {name: value for name, value in inputs.items() if name not in ("labels", "weight")}
        labels, weight = inputs.get("labels"), inputs.get("weight")
        _refuse_batch(rest, labels, weight, training=model.training)
        assert labels is not None
        outputs = model(**rest)
        logits, targets = outputs.logits[:, :-1].float(), labels[:, 1:]
        nll = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")  # [B, L - 1]
        mean = nll.sum(dim=1) / (targets != IGNORE).sum(dim=1)
        loss = (mean if weight is None else weight.to(mean) * mean).mean()
        return (loss, outputs) if return_outputs else loss

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that are kept for the collator: also the weight, which the model knows nothing of."""
        super()._set_signature_columns_if_needed()
        kept: Any = self._signature_columns  # a list by now
        if "weight" not in kept:
            kept.append("weight")


class _Collator:
    """Pads rows on the right, and keeps their weights."""

    def __init__(self, pad_id: int) -> None:
        self._pad = pad_id

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = collate([SimpleNamespace(**row) for row in rows], self._pad)
        weights = [row["weight"] for row in rows if "weight" in row]
        return {**batch, "weight": tensor(weights)} if len(weights) == len(rows) else batch


def _refuse_settings(args: Any, options: Mapping[str, Any]) -> None:
    for name in ("packing", "padding_free"):
        if getattr(args, name, False):
            raise ConfigError(f"WeightedTrainer: {name} = True: {_WHY_PACKING}")
    if getattr(args, "label_smoothing_factor", 0):
        raise ConfigError(
            f"WeightedTrainer: label_smoothing_factor = {args.label_smoothing_factor}, which its loss does not have; "
            "set it to 0"
        )
    if options.get("compute_loss_func") is not None:
        raise ConfigError("WeightedTrainer: compute_loss_func is given, but the loss is its own; use a plain Trainer")


def _refuse_rows(rows: Any) -> None:
    """Refuse at once what can be seen of the training rows: their columns and, of a set in memory, their weights."""
    columns = getattr(rows, "column_names", None)
    if columns is None:
        return
    packed = [name for name in _PACKED if name in columns]
    if packed:
        raise DataError(f"WeightedTrainer: the rows have a column '{packed[0]}', as packed rows have: {_WHY_PACKING}")
    for name, what in (("weight", "the weights of the selection"), ("labels", "which tokens are learned")):
        if name not in columns:
            raise DataError(
                f"WeightedTrainer: the rows have no column '{name}' ({what}), only {', '.join(columns)}; a step before "
                "has dropped it, as `map(remove_columns=...)` and packing do: keep it there"
            )
    if hasattr(rows, "__len__"):
        _refuse_weights(rows["weight"])


def _refuse_weights(weights: Iterable[Any]) -> None:
    for place, weight in enumerate(weights):
        usable = isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0
        if not usable:
            packing = f" (packed rows? {_WHY_PACKING})" if isinstance(weight, (list, tuple)) else ""
            raise DataError(f"WeightedTrainer: row {place} has weight {weight!r}; expected a number from 0 on{packing}")


def _refuse_batch(rest: Mapping[str, Any], labels: Any, weight: Any, *, training: bool) -> None:
    """Refuse what only a batch shows: what the collator has made of the rows."""
    if labels is None or (weight is None and training):
        lost = "labels" if labels is None else "weight"
        raise DataError(
            f"WeightedTrainer: the batch has no '{lost}', only {', '.join(rest)}: the data collator has dropped it; "
            "leave data_collator out, or pass one that keeps it"
        )
    packed = [name for name in _PACKED if name in rest]
    if packed or (weight is not None and len(weight) != len(labels)):
        what = f"'{packed[0]}'" if packed else f"{len(weight)} weights for {len(labels)} sequences"
        raise DataError(f"WeightedTrainer: the batch has {what}, as packed rows have: {_WHY_PACKING}")
    if not (labels[:, 1:] != IGNORE).any(dim=1).all():
        raise DataError("WeightedTrainer: a row of the batch has no label after its first token: leave such rows out")
