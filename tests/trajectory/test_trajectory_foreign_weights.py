"""What peft saves beside the matrices of an adapter: embeddings and output layer of a resized model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gradpursuit.config import LoraSection
from gradpursuit.errors import TrajectoryError
from gradpursuit.trajectory.foreign_weights import put_foreign_weights
from gradpursuit.trajectory.model import attach_lora, trainable


def base(vocabulary: int, tied: bool) -> Any:
    """A model of 97 tokens, resized where more are wanted."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    if vocabulary > 97:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.requires_grad_(False)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def saved(request: pytest.FixtureRequest, tiny: Any, tmp_path: Path) -> tuple[Path, Any, Any]:
    """The folder of an adapter that peft has saved with its embeddings, the resized base model, and the adapter."""
    resized = base(99, request.param)
    values = {name: value.clone() for name, value in resized.state_dict().items()}
    adapted = tiny.randomize(attach_lora(resized, LoraSection(r=2), 0))
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    again = base(99, request.param)
    again.load_state_dict(values)
    return tmp_path, again, adapted


def rewritten(folder: Path, change: Any) -> None:
    """Change the tensors of the adapter's file that are no LoRA matrices."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    made = {name: value if "lora_" in name else change(value) for name, value in tensors.items()}
    assert sum("lora_" not in name for name in made) == 2
    save_file({name: value.clone().contiguous() for name, value in made.items()}, path)


@pytest.mark.parametrize("change", [lambda value: value, lambda value: value.to(torch.bfloat16)])
def test_embeddings_that_are_those_of_the_model_are_accepted(saved: tuple[Path, Any, Any], change: Any) -> None:
    folder, resized, adapted = saved
    rewritten(folder, change)
    model = attach_lora(resized, LoraSection(r=2), 1)
    put_foreign_weights(folder, model)
    wanted = trainable(adapted)
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in trainable(model).items())


def test_the_model_before_it_was_resized_is_explained(saved: tuple[Path, Any, Any]) -> None:
    folder, resized, _ = saved
    model = attach_lora(base(97, resized.config.tie_word_embeddings), LoraSection(r=2), 0)
    with pytest.raises(TrajectoryError, match=r"a vocabulary of 99, model\.path has 97 .*give the resized model"):
        put_foreign_weights(folder, model)


def test_embeddings_that_were_trained_are_refused_by_name(saved: tuple[Path, Any, Any]) -> None:
    folder, resized, _ = saved
    rewritten(folder, lambda value: value + 0.1)
    model = attach_lora(resized, LoraSection(r=2), 0)
    named = re.compile(r"lm_head\.weight' is not as in model\.path, and it is not part of the adapter")
    with pytest.raises(TrajectoryError, match=named):
        put_foreign_weights(folder, model)


def test_what_is_no_part_of_the_model_stays_unknown(saved: tuple[Path, Any, Any]) -> None:
    folder, resized, _ = saved
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.extra.weight": torch.zeros(2)}, path)
    with pytest.raises(TrajectoryError, match=r"1 unknown .*extra"):
        put_foreign_weights(folder, attach_lora(resized, LoraSection(r=2), 0))
