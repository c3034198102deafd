"""Rows in one sequence: no padding between them, and what all of them begin with is computed once.

A chat template begins every row with the same system prompt; of short questions it is a third of the tokens. Tokens of
a row attend to that beginning and to their own row, at the positions that they have in the row alone, so that every
row has the loss and the gradient that it has alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gradpursuit.data import IGNORE
from gradpursuit.trajectory.loss import padded_width

logger = logging.getLogger("gradpursuit")
_SHORTEST = 4  # tokens of a common beginning that are worth it
_TOLERANCE = 1e-3  # relative, of float32 logits
_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
# In the names of settings: attention by distance, and attention that would look at all pairs of a sequence, as its
# keys and values differ in size.
_UNSUITED = ("window", "chunk", "block", "local_attention", "kv_lora_rank")
_LEAST = torch.finfo(torch.float32).min
_current: ContextVar[Layout | None] = ContextVar("layout", default=None)


class Layout:
    """Where the tokens of rows lie in one sequence, and how attention sees them: each row with the common beginning.

    Of R rows, the longest of which adds L tokens to a beginning of P:

    Attributes:
        size: N, tokens of the sequence.
        shared: P.
        used: tokens that belong to a row; those behind them are padding.
        own: [R, L] int64, the place of each row's own tokens; 0 beyond its end.
        real: [R, L] bool, which of them are a row's.
        mask: [R, L, P + L] float32, added to the scores of a row's tokens with the beginning and the row.
        before: [1, P, P] float32, the same of the beginning's tokens.
        place: [N - P] int64, of every token behind the beginning its place in [R · L]; 0 for padding.
    """

    def __init__(self, shared: int, lengths: Sequence[int], size: int) -> None:
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.size, self.shared, self.used = size, shared, shared + sum(lengths)
        order, length = torch.arange(max(lengths)), torch.tensor(lengths)
        start = shared + length.cumsum(0) - length
        self.real = order < length[:, None]
        self.own = torch.where(self.real, start[:, None] + order, 0)
        self.before = _causal(shared)[None]
        self.mask = torch.cat([torch.zeros(len(order), shared), _causal(len(order))], dim=1).repeat(len(lengths), 1, 1)
        self.place = torch.zeros(size - shared, dtype=torch.long)
        self.place[: self.used - shared] = self.real.flatten().nonzero()[:, 0]

    def seen_by(self, heads: int) -> tuple[Tensor, Tensor]:
        """Places in a sequence of `heads` heads [heads · N], row by row and head by head: of the rows' own tokens
        [R · heads · L], and of what these can see [R · heads · (P + L)]; int64."""
        if heads not in self._seen:
            before = torch.arange(self.shared).expand(len(self.own), -1)
            first = torch.arange(heads)[None, :, None] * self.size
            places = (self.own, torch.cat([before, self.own], dim=1))
            own, keys = ((first + place[:, None]).flatten() for place in places)
            self._seen[heads] = own, keys
        return self._seen[heads]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Attention over this sequence may be computed row by row inside the block."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def _causal(length: int) -> Tensor:
    """[L, L], to be added to scores."""
    return torch.full((length, length), _LEAST).triu(1)


def current_layout(size: int) -> Layout | None:
    """That of the sequence of N = `size` tokens which the calling thread is at."""
    layout = _current.get()
    return layout if layout is not None and layout.size == size else None


def pack(rows: Sequence[Any], pad_id: int) -> tuple[dict[str, Tensor], Layout]:
    """Rows with `input_ids` and `labels` as one sequence of N tokens, N a :func:`padded_width`.

    Args:
        rows: B of them.
        pad_id: any token, for the end.

    Returns:
        `input_ids`, `position_ids`, `targets` (what a position predicts, or -100) and `row` (the row that a token
        belongs to) [1, N] int64; `attention_mask` [1, 1, N, N] float32, to be added to scores. And the layout.
    """
    shared = common_prefix(rows)
    lengths = [len(row.input_ids) - shared for row in rows]
    size = padded_width(shared + sum(lengths))
    ids, targets = torch.full((1, size), pad_id), torch.full((1, size), IGNORE)
    positions, row = torch.zeros((2, 1, size), dtype=torch.long)
    owner = torch.full((size,), -1)  # -1: padding
    ids[0, :shared] = torch.tensor(rows[0].input_ids[:shared], dtype=torch.long)
    positions[0, :shared] = torch.arange(shared)
    owner[:shared] = len(rows)
    start = shared
    for number, (one, length) in enumerate(zip(rows, lengths, strict=True)):
        own = slice(start, start + length)
        ids[0, own] = torch.tensor(one.input_ids[shared:])
        positions[0, own] = torch.arange(shared, shared + length)
        targets[0, start : start + length - 1] = torch.tensor(one.labels[shared + 1 :], dtype=torch.long)
        row[0, own] = owner[own] = number
        start += length
    order = torch.arange(size)
    seen = (owner[:, None] == owner[None]) | ((owner[None] == len(rows)) & (owner[:, None] >= 0))
    seen &= (order[:, None] >= order[None]) & (owner[None] >= 0)
    seen |= order[:, None] == order[None]
    mask = torch.zeros(size, size).masked_fill_(~seen, _LEAST)
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": mask[None, None]}
    return {**batch, "targets": targets, "row": row}, Layout(shared, lengths, size)


def common_prefix(rows: Sequence[Any]) -> int:
    """How many tokens all rows begin with, all of which come before the token that predicts a row's first label."""
    first = rows[0].input_ids
    longest = min(next((i for i, label in enumerate(row.labels) if label != IGNORE), 1) - 1 for row in rows)
    shared = next((i for i in range(longest) if any(row.input_ids[i] != first[i] for row in rows)), max(0, longest))
    return shared if shared >= _SHORTEST and len(rows) > 1 else 0


def can_pack(model: nn.Module) -> bool:
    """Whether a model gives rows in one sequence the logits that it gives them alone: its own code is tried out.

    Models whose layers look at a window, carry a state along or attend to latent vectors are never packed. A base
    model is tried once, whatever adapter it has later.
    """
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if base not in _tried:
        _tried[base] = _same_in_one_sequence(model)
    return _tried[base]


def _same_in_one_sequence(model: nn.Module) -> bool:
    config: Any = model.config
    config = config.get_text_config()
    vocabulary: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    weight: Any = getattr(vocabulary, "weight", None)
    if getattr(config, "is_encoder_decoder", False) or weight is None or _attends_otherwise(config):
        return False
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, len(weight), (3, 14), generator=generator)
    made[:, :6] = made[0, :6]
    rows = [
        SimpleNamespace(input_ids=ids[:length], labels=[IGNORE] * 8 + ids[8:length])
        for ids, length in zip(made.tolist(), (14, 10, 12), strict=True)
    ]
    device = next(model.parameters()).device
    packed = {name: value.to(device) for name, value in pack(rows, 0)[0].items()}
    targets, number = packed.pop("targets")[0], packed.pop("row")[0]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            together = model(**packed, use_cache=False).logits[0]
            for i, row in enumerate(rows):
                alone = model(input_ids=torch.tensor([row.input_ids], device=device), use_cache=False).logits[0]
                found, expected = together[(number == i) & (targets != IGNORE)], alone[7 : len(row.input_ids) - 1]
                if found.shape != expected.shape or not (found - expected).norm() <= _TOLERANCE * expected.norm():
                    return False
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError) as error:
        logger.debug("rows cannot share a sequence in %s: %s", type(model).__name__, error)
        return False
    finally:
        for module in training:
            module.training = True
    return True


def _attends_otherwise(config: Any) -> bool:
    """Whether some layer attends in a way that one sequence does not suit: no short trial would show that."""
    settings = config.to_dict()
    kinds = [*(settings.get("layer_types") or ()), *(settings.get("attention_layers") or ())]
    if any(kind not in ("full_attention", "global") for kind in kinds):
        return True
    named = {name for name, value in settings.items() if value and any(word in name for word in _UNSUITED)}
    return bool(named - {"max_window_layers", "use_sliding_window"})


def has_dropout(model: nn.Module) -> bool:
    """Whether some layer drops at random in training."""
    config: Any = model.config
    settings = config.get_text_config().to_dict()
    named = any(value for name, value in settings.items() if name in ("attention_dropout", "attn_pdrop"))
    return named or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def own_tokens(rows: Sequence[Any]) -> list[int]:
    """Tokens that each row adds to a sequence."""
    shared = common_prefix(rows)
    return [len(row.input_ids) - shared for row in rows]


def divide(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Indices in `parts` groups, of about as many tokens each: the largest first, each to the least group so far."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    loads = [0] * parts
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        groups[least].append(index)
        loads[least] += sizes[index]
    return [sorted(group) for group in groups if group]
