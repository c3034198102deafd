"""What a model can take of a row is known from its settings alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gradpursuit.config import DataSection, ModelSection
from gradpursuit.data import Renderer
from gradpursuit.data.limits import Limits
from gradpursuit.data.prepare import prepare
from gradpursuit.errors import ConfigError, DataError, ModelError
from gradpursuit.trajectory.limits import load_limits
from gradpursuit.trajectory.model import load_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 50,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 50}
LEARNED: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": {},
    "gptj": {**GPT, "rotary_dim": 4},
    "codegen": {**GPT, "n_ctx": 50, "rotary_dim": 4},
    "gpt_bigcode": GPT,
    "ctrl": {**GPT, "dff": 48},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 50},
}
ENDLESS: dict[str, dict[str, Any]] = {"llama": {}, "bloom": {"n_layer": 2, "n_head": 4}, "gpt_neox": {}, "mamba": {}}


def section(folder: Path, kind: str, **settings: Any) -> ModelSection:
    """A folder with the settings of a model, and nothing else."""
    transformers.AutoConfig.for_model(kind, **{**SMALL, **settings}).save_pretrained(folder)
    return ModelSection(path=str(folder), device="cpu", precision="float32")


def takes(section: ModelSection, length: int) -> bool:
    """Whether the model itself takes rows of that length."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(section.path)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.zeros(1, length, dtype=torch.long) + 3
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", LEARNED)
def test_positions_are_those_that_the_model_takes(tmp_path: Path, kind: str) -> None:
    model = section(tmp_path, kind, **LEARNED[kind])
    assert load_limits(model, 1024) == Limits(vocabulary=97, positions=50, longest=48)  # 49 would be padded to 56
    assert takes(model, 50)
    assert not takes(model, 51)


@pytest.mark.parametrize("kind", ENDLESS)
def test_other_models_have_no_limit(tmp_path: Path, kind: str) -> None:
    model = section(tmp_path, kind, **ENDLESS[kind])
    assert load_limits(model, 1024) == Limits(vocabulary=97)
    assert takes(model, 80)


def test_more_than_a_rotary_model_was_made_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = section(tmp_path, "llama")
    with caplog.at_level(logging.WARNING, logger="gradpursuit"):
        load_limits(model, 50)
        assert not caplog.messages
        load_limits(model, 51)
    assert "data.max_tokens = 51 is more than the 50 positions" in caplog.messages[0]


ROPES: list[tuple[str, dict[str, Any], int | None]] = [
    ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 48),
    (
        "llama",
        {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 16, "factor": 4.0,
        },
        16,
    ),
    ("llama", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, None),
    ("llama", {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 25}, None),
    (
        "llama",
        {
            "rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 25,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
        None,
    ),
    (
        "gemma3_text",
        {
            "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        48,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "rope", "most"), ROPES)
def test_positions_that_depend_on_the_batch_are_refused(
    tmp_path: Path, kind: str, rope: dict[str, Any], most: int | None
) -> None:
    model = section(tmp_path, kind, rope_parameters=rope, head_dim=8)
    if most is None:
        assert load_limits(model, 1024).positions is None
        return
    with pytest.raises(ConfigError, match=rf"data.max_tokens = 1024.*set data\.max_tokens: {most}$"):
        load_limits(model, 1024)
    assert load_limits(model, most).positions is None


def test_broken_settings_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_limits(ModelSection(path=str(tmp_path), device="cpu"), 10)


def _prepared(tiny_config: ModelSection, folder: Path, limits: Limits) -> dict[str, Any]:
    """Eight short rows and two of more than 30 tokens."""
    lines = [f'{{"prompt": "Count {i}", "completion": "{"one two " * (1 + 30 * (i > 7))}{i}"}}' for i in range(10)]
    (folder / "pool.jsonl").write_text("\n".join(lines))
    target = [f'{{"prompt": "Say {i}", "completion": "{i}"}}' for i in range(4)]
    (folder / "target.jsonl").write_text("\n".join(target))
    data = DataSection(
        pool=[str(folder / "pool.jsonl")], target=[str(folder / "target.jsonl")], max_dropped=0.5, max_tokens=500
    )
    return prepare(data, Renderer(load_tokenizer(tiny_config), limits=limits), folder / "data", 0.5, 0)


def test_rows_that_have_no_positions_are_dropped_with_that_reason(tiny_config: ModelSection, tmp_path: Path) -> None:
    counts = _prepared(tiny_config, tmp_path, Limits(positions=64, longest=64))
    assert counts["rows"]["pool"] == 8
    assert counts["dropped"] == {"pool: longer than the model's 64 positions": 2}


def test_a_token_without_an_embedding_stops_before_any_work(tiny_config: ModelSection, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"of row .*target\.jsonl:1 is past the model's 5 embeddings.*resize them"):
        _prepared(tiny_config, tmp_path, Limits(vocabulary=5))
    assert not (tmp_path / "data").exists()
