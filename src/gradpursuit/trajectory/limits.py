"""What a model's settings say of the rows that it can take; no weights are read."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from gradpursuit.config import ModelSection
from gradpursuit.data.limits import Limits
from gradpursuit.errors import ConfigError
from gradpursuit.trajectory.loss import padded_width
from gradpursuit.trajectory.model import load_config

logger = logging.getLogger("gradpursuit")
_BY_LONGEST = ("dynamic", "longrope", "su")  # frequencies that the largest position of a whole batch decides


def load_limits(config: ModelSection, max_tokens: int) -> Limits:
    """The limits of the model in `config`.

    Raises:
        ModelError: the model's settings cannot be read.
        ConfigError: rows of up to `max_tokens` tokens would change what the model makes of shorter ones in their batch.
    """
    settings = load_config(config)
    text = settings.get_text_config()
    _refuse_mixed_scales(text, max_tokens)
    shape = _shape(settings, config.trust_remote_code)
    vocabulary, positions = getattr(text, "vocab_size", None), None
    if shape is not None:
        vocabulary, positions = _embedded(shape, vocabulary), _positions(shape)
    trained = getattr(text, "max_position_embeddings", None)
    if positions is None and isinstance(trained, int) and 0 < trained < max_tokens:
        logger.warning(
            "data.max_tokens = %d is more than the %d positions that the model was made for (max_position_embeddings): "
            "of longer rows it may make little", max_tokens, trained,
        )  # fmt: skip
    return Limits(vocabulary, positions, None if positions is None else _longest(positions))


def _longest(positions: int) -> int:
    """Tokens of the longest row whose padded width has a place for each position."""
    return next((tokens for tokens in range(positions, 0, -1) if padded_width(tokens) <= positions), 0)


def _refuse_mixed_scales(text: Any, max_tokens: int) -> None:
    """Rope types that take the frequencies of a batch from its longest row: rows must stay on one side of the limit."""
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if not isinstance(given, dict):
        return
    for rope in (given, *(value for value in given.values() if isinstance(value, dict))):
        kind = rope.get("rope_type", rope.get("type"))
        limit = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", getattr(text, "max_position_embeddings", None)
        )
        if kind in _BY_LONGEST and isinstance(limit, int | float) and padded_width(max_tokens) > limit:
            raise ConfigError(
                f"data.max_tokens = {max_tokens}: the model's rotary positions ({kind}) change for a whole batch when "
                f"a row of it is longer than {int(limit)} tokens, so that shorter rows would not be what they are "
                f"alone; set data.max_tokens: {_longest(int(limit))}"
            )


def _shape(settings: Any, trust: bool) -> Any:
    """The model without its numbers; None if its code does not allow it."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=trust)
    except Exception as error:  # whatever the model's code raises: loading it says so with more reason
        logger.debug("limits from the settings alone: %s", error)
        return None


def _embedded(model: Any, vocabulary: int | None) -> int | None:
    """Tokens that both the embeddings and the output layer have a row for."""
    found = []
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.dim() == 2:
            found.append(max(weight.shape) if type(layer).__name__ == "Conv1D" else len(weight))
    return min(found) if found else vocabulary


def _positions(model: nn.Module) -> int | None:
    """Positions that a table of the model has a row for; None: it has no such table."""
    found = []
    words = model.get_input_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Embedding) and module is not words and ("pos" in last or last == "wpe"):
            before = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            found.append(module.num_embeddings - int(before))
        for table in (getattr(module, "embed_positions", None), getattr(module, "pos_encoding", None)):
            if isinstance(table, torch.Tensor) and table.dim() == 2:
                found.append(len(table))
    config: Any = model.config
    if getattr(config, "model_type", "") == "mpt":
        found.append(int(config.max_seq_len))
    return min(found) if found else None
