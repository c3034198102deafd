"""Rows to train on and to score: questions with short answers."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from gradpursuit.data import Renderer, Row, Table
from gradpursuit.trajectory.model import Compute

FLOAT32 = Compute(torch.device("cpu"), None)


def rows(tokenizer: PreTrainedTokenizerBase, word: str, count: int) -> Table:
    """Questions of different lengths whose answer is a word, once or a few times."""
    renderer, made = Renderer(tokenizer), []
    for i in range(count):
        messages = [
            {"role": "user", "content": f"Say {word} {i}" + " please" * (i % 4)},
            {"role": "assistant", "content": " ".join([word] * (1 + i % 3))},
        ]
        rendered = renderer(messages)
        made.append(Row(f"{word}-{i}", f"{word}-{i}", "f", i, "{}", rendered.input_ids, rendered.labels))
    return Table(made)
