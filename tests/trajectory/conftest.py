"""The tiny model, loaded as a run loads it, with a table of real renderings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradpursuit.config import LoraSection, ModelSection
from gradpursuit.data import Renderer, Row, Table
from gradpursuit.trajectory.model import attach_lora, load_model, load_tokenizer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads only wait for each other on models this small."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_config(tiny_path: Path) -> ModelSection:
    return ModelSection(path=str(tiny_path), device="cpu", precision="float32")


@pytest.fixture(scope="session")
def small_table(tiny_config: ModelSection) -> Table:
    """Twelve short rows in the chat template."""
    renderer = Renderer(load_tokenizer(tiny_config))
    rows = []
    for number in range(12):
        rendered = renderer(
            [
                {"role": "user", "content": f"Count to {number}."},
                {"role": "assistant", "content": " ".join(str(i) for i in range(number % 4 + 1))},
            ]
        )
        rows.append(Row(f"r{number}", str(number), "p", number + 1, "{}", rendered.input_ids, rendered.labels))
    return Table(rows)


@pytest.fixture
def fresh(tiny_config: ModelSection) -> Callable[..., Any]:
    """Builds the tiny model with a fresh adapter."""

    def build(r: int = 4, seed: int = 0, **settings: Any) -> Any:
        return attach_lora(load_model(tiny_config), LoraSection(r=r, alpha=8, **settings), seed)

    return build
