"""Tiny models of several architectures with random LoRA weights, and the plain autograd oracle."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gradpursuit.config import LoraSection
from gradpursuit.data import IGNORE, Row
from gradpursuit.trajectory.model import attach_lora, trainable

VOCABULARY = 97


def build_base(kind: str, attention: str = "eager") -> Any:
    """A two-layer random model of one architecture, frozen and in evaluation mode."""
    import transformers

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    decoder = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **common,
    }
    gemma = {**decoder, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaConfig(**decoder, tie_word_embeddings=True),
        "qwen2": lambda: transformers.Qwen2Config(**decoder),
        "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common),
        "gemma2": lambda: transformers.Gemma2Config(**gemma, final_logit_softcapping=1.5, attn_logit_softcapping=2.0),
        "gemma3": lambda: transformers.Gemma3TextConfig(**gemma, final_logit_softcapping=1.5),
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
            **decoder,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
    }
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(configs[kind](), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms are constants otherwise
    model.requires_grad_(False)
    return model.eval()


def randomize(model: Any, seed: int = 3) -> Any:
    """Random values in every trainable matrix: a fresh LoRA B is zero, and hides half of the gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def build_lora(kind: str, attention: str = "eager", **settings: Any) -> Any:
    """A tiny model with a random adapter."""
    return randomize(attach_lora(build_base(kind, attention), LoraSection(r=3, alpha=5, **settings), seed=0))


def build_plain(kind: str, pattern: str) -> Any:
    """A tiny model without an adapter; the weights of the linear layers that match are trainable."""
    from transformers.pytorch_utils import Conv1D

    model = build_base(kind)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and re.search(pattern, name):
            module.weight.requires_grad_(True)
    return model


def random_rows(lengths: Sequence[int], seed: int = 0, vocabulary: int = VOCABULARY, prompt: float = 0.4) -> list[Row]:
    """Rows of random tokens; the first `prompt` share of each is unsupervised, and so is one token in the middle."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        head = int(prompt * length)
        labels = [IGNORE] * head + ids[head:]
        if length > 8:
            labels[-3] = IGNORE
        rows.append(Row(f"row-{number}", f"{number:064x}", "rows.jsonl", number + 1, "{}", ids, labels))
    return rows


def oracle(model: Any, row: Row) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of every LoRA matrix for one row alone, by the model's own loss and plain autograd."""
    parameters = trainable(model)
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
    loss.backward()
    gradients = {name: parameter.grad.detach().clone() for name, parameter in parameters.items()}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


TINY = SimpleNamespace(
    base=build_base, lora=build_lora, plain=build_plain, randomize=randomize, rows=random_rows, oracle=oracle
)
