from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradpursuit.config import ModelSection
from gradpursuit.data import Table
from gradpursuit.trajectory.model import load_model, load_tokenizer
from questions import rows


@pytest.fixture
def base(tiny_path: Path) -> PreTrainedModel:
    return load_model(ModelSection(path=str(tiny_path), device="cpu"))


@pytest.fixture(scope="session")
def tokenizer(tiny_path: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSection(path=str(tiny_path)))


@pytest.fixture
def tables(tokenizer: PreTrainedTokenizerBase) -> tuple[Table, Table]:
    """A pool, half of it useful for the held-out rows, and those."""
    useful, other = list(rows(tokenizer, "apple", 8)), list(rows(tokenizer, "zebra", 8))
    return Table(useful + other), rows(tokenizer, "apple", 12).take(range(8, 12))
