"""Loading: one clear message for every model that is not there, not a model, or has nothing to adapt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradpursuit.config import LoraSection, ModelSection
from gradpursuit.errors import ConfigError, ModelError
from gradpursuit.identity import model_identity
from gradpursuit.trajectory.model import (
    Compute,
    attach_lora,
    load_model,
    load_tokenizer,
    pad_id,
    trainable,
)


def section(path: Path | str, **settings: Any) -> ModelSection:
    return ModelSection(path=str(path), **{"device": "cpu", "precision": "float32", **settings})


def test_loaded_frozen_in_float32(tiny_path: Path) -> None:
    model = load_model(section(tiny_path))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert load_tokenizer(section(tiny_path)).chat_template


def folder_with(tmp_path: Path, **files: str) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_bad_paths_are_one_message(tmp_path: Path, load: Callable[[ModelSection], Any]) -> None:
    (tmp_path / "weights.bin").write_text("no model")
    (tmp_path / "broken.gguf").write_text("no model")
    empty = folder_with(tmp_path)
    for path, message in (
        (tmp_path / "none", "no such folder; give a folder, a GGUF file or a hub id"),
        ("./none", "no such folder"),
        ("a/b/c", "no such folder"),
        (empty, "the folder holds no config.json"),
        (tmp_path / "weights.bin", "a file, but no GGUF file"),
        (tmp_path / "none.gguf", "no such GGUF file"),
        (tmp_path / "broken.gguf", "cannot be loaded|no usable tokenizer"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            load(section(path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "no-such-model"}', '{"model_type": "vit"}'])
def test_folder_that_is_no_causal_model(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelError, match=r"model\.path '.*': cannot be loaded: .+") as caught:
        load_model(section(folder_with(tmp_path, config__json=text)))
    assert "\n" not in str(caught.value)


def test_config_without_weights_and_broken_weights(tiny_path: Path, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, config__json=(tiny_path / "config.json").read_text())
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(section(folder))
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_tokenizer(section(folder))
    (folder / "model.safetensors").write_bytes((tiny_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(section(folder))


def test_cuda_where_there_is_none(tiny_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match=r"model\.device 'cuda' cannot be used here: .+"):
        Compute.of(section(tiny_path, device="cuda"))
    assert Compute.of(section(tiny_path, device="auto")).device.type == "cpu"


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "cuda:99"])
def test_devices_that_are_none(tiny_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used here") as caught:
        Compute.of(section(tiny_path, device=device))
    assert "\n" not in str(caught.value)


def test_precision(tiny_path: Path) -> None:
    assert Compute.of(section(tiny_path, precision="float32")).autocast is None
    compute = Compute.of(section(tiny_path, precision="bfloat16"))
    assert compute.autocast is torch.bfloat16
    assert str(compute) == "CPU, bfloat16 autocast"


def test_adapter_is_fresh_and_seeded(tiny_path: Path) -> None:
    def adapter(seed: int) -> dict[str, torch.Tensor]:
        model = attach_lora(load_model(section(tiny_path)), LoraSection(r=3), seed)
        return {name: p.detach() for name, p in trainable(model).items()}

    one, same, other = adapter(0), adapter(0), adapter(1)
    assert len(one) == 28
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert all(not value.any() for name, value in one.items() if "lora_B" in name)
    assert not any(".default." in name or "lm_head" in name for name in one)


@pytest.mark.parametrize("modules", ["nothing_like_this", ["c_attn"], "(", [], ["norm"]])
def test_target_modules_that_match_nothing(tiny_path: Path, modules: Any) -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM with model\.lora\.target_modules=") as caught:
        attach_lora(load_model(section(tiny_path)), LoraSection(target_modules=modules), 0)
    assert "q_proj" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_model_without_linear_layers() -> None:
    from torch import nn
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

    class Bag(PreTrainedModel, GenerationMixin):
        config_class = PreTrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.embed = nn.Embedding(10, 4)

        def get_output_embeddings(self) -> None:
            return None

        def prepare_inputs_for_generation(self, *args: Any, **options: Any) -> Any:
            raise NotImplementedError

    for modules in ("all-linear", ["q_proj"]):
        with pytest.raises(ModelError, match=r"Bag.*(linear layers found: none|no linear layers)"):
            attach_lora(Bag(PreTrainedConfig()), LoraSection(target_modules=modules), 0)


def test_identity_tells_models_apart(tiny_path: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(tiny_path, tmp_path / "copy")
    same = model_identity(section(copy))
    assert same == model_identity(section(tiny_path))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_identity(section(copy)) != same
    (tmp_path / "m.gguf").write_bytes(b"x")
    assert set(model_identity(section(tmp_path / "m.gguf"))) == {"m.gguf"}
    assert model_identity(section("org/name", revision="main")) == {"hub": "org/name", "revision": "main"}


@pytest.mark.parametrize(("given", "used"), [(-1, 0), (None, 0), (97, 0), (96, 96), (3, 3)])
def test_rows_are_padded_with_a_token_of_the_embedding(tiny: Any, given: int | None, used: int) -> None:
    model = tiny.base("llama")
    model.config.pad_token_id = given
    assert pad_id(model) == used
