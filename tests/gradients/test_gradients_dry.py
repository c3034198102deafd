"""What a model's gradients would refuse is known from two short rows, with the setting that works."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from gradpursuit.config import LoraSection
from gradpursuit.errors import ModelError
from gradpursuit.gradients.dry import dry_pass
from gradpursuit.gradients.per_example import PerExampleGradients
from gradpursuit.trajectory.followed import followed_layers
from gradpursuit.trajectory.loss import SupervisedLoss, collate
from gradpursuit.trajectory.model import Compute, attach_lora, trainable

FLOAT32 = Compute(torch.device("cpu"), None)
TOKENS = list(range(3, 40))
SMALL: dict[str, Any] = {
    "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "minimax": {"num_local_experts": 4, "head_dim": 8},
    "deepseek_v3": {**LATENT, "n_group": 1, "topk_group": 1},
    "deepseek_v2": LATENT,
}


def base(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.requires_grad_(False).eval()


def advised(message: str) -> list[str]:
    found = re.search(r"model\.lora\.target_modules: \[([^\]]*)\]", message)
    assert found, message
    return found[1].split(", ")


@pytest.mark.parametrize("kind", MIXTURES)
def test_adapters_on_experts_are_refused_and_what_is_advised_works(kind: str) -> None:
    with pytest.raises(ModelError, match="bare parameters") as refused:
        followed_layers(attach_lora(base(kind, **MIXTURES[kind]), LoraSection(r=2), 0))
    for name in ("mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"):
        assert name in str(refused.value)
    modules = advised(str(refused.value))
    model = attach_lora(base(kind, **MIXTURES[kind]), LoraSection(r=2, target_modules=modules), 0)
    dry_pass(model, FLOAT32, TOKENS)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trainable(model)} == set(modules)


@pytest.mark.parametrize(
    ("kind", "settings", "named", "kept"),
    [
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, {"fc1", "fc2"}, {"q_proj", "k_proj", "v_proj", "out_proj"}),
        (
            "qwen2_moe",
            {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
            {"shared_expert_gate"},
            {"q_proj"},
        ),
    ],
)
def test_all_layers_without_a_batch_are_named_at_once(
    kind: str, settings: dict[str, Any], named: set[str], kept: set[str]
) -> None:
    modules: Any = "all-linear" if kind == "opt" else ["q_proj", "shared_expert_gate"]
    model = attach_lora(base(kind, **settings), LoraSection(r=2, target_modules=modules), 0)
    before = {name: parameter.clone() for name, parameter in trainable(model).items()}
    with pytest.raises(ModelError, match="without a batch dimension") as refused:
        dry_pass(model, FLOAT32, TOKENS)
    assert all(name in str(refused.value) for name in named)
    assert set(advised(str(refused.value))) == kept
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainable(model).items())
    again = attach_lora(base(kind, **settings), LoraSection(r=2, target_modules=sorted(kept)), 0)
    dry_pass(again, FLOAT32, TOKENS)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "qwen2"])
def test_models_that_can_be_followed_pass_and_stay_as_they_were(tiny: Any, kind: str) -> None:
    model = attach_lora(tiny.base(kind), LoraSection(r=2), 0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    dry_pass(model, FLOAT32, TOKENS[:5])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def captured(model: Any, tiny: Any) -> None:
    rows = tiny.rows([9, 5])
    with PerExampleGradients(model).capture(lambda name, gradient: None, len(rows)):
        SupervisedLoss(model, FLOAT32)(collate(rows, 0))[0].sum().backward()


def test_a_weight_used_beside_its_layer_is_refused_by_name(tiny: Any) -> None:
    model = tiny.plain("llama", r"o_proj|q_proj")
    used, user = (model.get_submodule(f"model.layers.{i}.self_attn.o_proj") for i in (0, 1))
    model.get_submodule("model.layers.1.mlp").register_forward_hook(
        lambda _module, _given, out: out + nn.functional.linear(out, used.weight)
    )
    with pytest.raises(ModelError, match=r"1 trainable parameters have a gradient.*layers\.\*\.self_attn\.o_proj"):
        captured(model, tiny)
    assert used.weight.grad is None
    assert user.weight.grad is None


def test_an_adapter_used_beside_its_layer_is_refused_by_name(tiny: Any) -> None:
    model = tiny.lora("llama")
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    model.get_submodule("base_model.model.model.layers.1.mlp").register_forward_hook(
        lambda _module, _given, out: out + layer.lora_A["default"].weight.sum()
    )
    with pytest.raises(ModelError, match=r"mlp\.up_proj\.lora_A.*target_modules: \[down_proj, gate_proj, k_proj"):
        captured(model, tiny)


def test_gradients_that_were_there_before_come_back(tiny: Any) -> None:
    model = tiny.lora("llama")
    first = next(iter(trainable(model).values()))
    first.grad = torch.ones_like(first)
    captured(model, tiny)
    assert first.grad is not None
    assert torch.equal(first.grad, torch.ones_like(first))
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 1


def test_a_model_that_looks_at_the_other_rows_is_refused(tiny: Any) -> None:
    model = tiny.lora("llama")
    model.get_submodule("base_model.model.model.layers.0.mlp").register_forward_hook(
        lambda _module, _given, out: out + out.mean(dim=0, keepdim=True)
    )
    with pytest.raises(ModelError, match="depends on the other rows of its batch"):
        dry_pass(model, FLOAT32, TOKENS)


def test_rows_that_are_not_the_first_dimension_are_refused(tiny: Any) -> None:
    model = tiny.lora("llama")
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    plain = layer.forward
    layer.forward = lambda x: plain(x)
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    inner = mlp.forward
    mlp.forward = lambda x: inner(x.reshape(1, -1, x.shape[-1])).reshape(x.shape)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp|layers\.\*\.mlp"):
        dry_pass(model, FLOAT32, TOKENS)
    with pytest.raises(ModelError, match="without a batch dimension"):
        captured(model, tiny)


def test_a_layer_that_is_used_by_the_width_of_the_batch_is_refused(tiny: Any) -> None:
    model = tiny.lora("llama")
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    inner = mlp.forward
    mlp.forward = lambda x: inner(x) * (x.shape[1] > 10)  # by a property that a batch has, not a row
    with pytest.raises(ModelError, match="depends on the other rows of its batch"):
        dry_pass(model, FLOAT32, TOKENS)


def test_an_adapter_on_a_router_is_refused_and_what_is_advised_works() -> None:
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(ModelError, match=r"more than a product \(model\.layers\.\*\.mlp\.router\)") as refused:
        dry_pass(attach_lora(base("phimoe", **settings), LoraSection(r=2), 0), FLOAT32, TOKENS)
    modules = advised(str(refused.value))
    dry_pass(attach_lora(base("phimoe", **settings), LoraSection(r=2, target_modules=modules), 0), FLOAT32, TOKENS)


def test_what_the_models_code_raises_is_one_message(tiny: Any) -> None:
    model = tiny.lora("llama")
    with pytest.raises(ModelError, match="cannot make a forward and backward pass"):
        dry_pass(model, FLOAT32, [10**6])
