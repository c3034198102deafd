"""Tests of gradients run in one thread."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads only wait for each other on models this small."""
    torch.set_num_threads(1)
