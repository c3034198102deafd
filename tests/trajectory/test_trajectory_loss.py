"""Batches, and the loss with logits only at labelled positions against the model's own full-logits loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradpursuit.data import IGNORE, Row, Table
from gradpursuit.errors import ModelError
from gradpursuit.trajectory.loss import SupervisedLoss, collate, padded_width, token_batches
from gradpursuit.trajectory.model import Compute

FLOAT32 = Compute(torch.device("cpu"), None)


def row(ids: list[int], labels: list[int]) -> Row:
    return Row("x", "h", "s", 1, "{}", ids, labels)


def gemma(cap: float | None) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=cap, pad_token_id=0,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def full_loss(model: Any, item: Row) -> tuple[float, int]:
    """By the model itself, all logits computed."""
    labels = torch.tensor([item.labels])
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([item.input_ids]), labels=labels).loss
    return float(loss), int((labels[:, 1:] != IGNORE).sum())


def test_collate_pads_on_the_right() -> None:
    batch = collate([row([5, 6, 7], [IGNORE, 6, 7]), row([8], [IGNORE])], 9)
    assert batch["input_ids"].tolist() == [[5, 6, 7, *[9] * 5], [8, *[9] * 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, *[0] * 5], [1, *[0] * 7]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, *[IGNORE] * 5], [IGNORE] * 8]
    assert collate([row([5], [5])], 9, width=16)["input_ids"].shape == (1, 16)


def test_batches_have_few_widths() -> None:
    widths = [padded_width(length) for length in range(1, 4097)]
    assert all(length <= width <= max(length + 7, length * 1.125) for length, width in enumerate(widths, 1))
    assert len(set(widths)) == 16 + 5 * 8  # multiples of 8 up to 128, then eight to an octave


@pytest.mark.parametrize("budget", [1, 7, 30, 10_000])
def test_token_batches_hold_every_row_once_within_the_budget(budget: int) -> None:
    lengths = torch.randint(1, 20, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = token_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(50))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * padded_width(max(lengths[i] for i in batch)) <= budget
    order = [index for batch in batches for index in batch]
    assert [(lengths[i], i) for i in order] == sorted((n, i) for i, n in enumerate(lengths))


def test_token_batches_of_nothing() -> None:
    assert token_batches([], 10) == []


def test_equals_the_loss_with_all_logits(fresh: Callable[..., Any], small_table: Table) -> None:
    model = fresh()
    rows = [*small_table[:4], row([5, 6, 7, 8], [5, 6, IGNORE, 8]), row([5, 6], [IGNORE, 6])]
    with torch.no_grad():
        nll, tokens = SupervisedLoss(model, FLOAT32)(collate(rows, 2))
    assert nll.dtype == torch.float32
    assert tokens.dtype == torch.int64
    for index, item in enumerate(rows):
        loss, count = full_loss(model, item)
        assert float(nll[index]) == pytest.approx(loss, rel=1e-5)
        assert int(tokens[index]) == count
    assert tokens[-2:].tolist() == [2, 1]  # nothing predicts the first token


@pytest.mark.parametrize("cap", [None, 2.0])
def test_what_the_model_does_to_its_logits_still_happens(cap: float | None) -> None:
    model = gemma(cap)
    rows = [row([5, 6, 7, 8], [IGNORE, 6, 7, 8]), row([9, 10, 11], [IGNORE, IGNORE, 11])]
    with torch.no_grad():
        nll, _ = SupervisedLoss(model, FLOAT32)(collate(rows, 0))
    assert nll.tolist() == pytest.approx([full_loss(model, item)[0] for item in rows], rel=1e-5)
    if cap:
        assert float((nll - SupervisedLoss(gemma(None), FLOAT32)(collate(rows, 0))[0].detach()).abs().max()) > 0.01


def test_no_other_logit_is_computed_and_the_hook_is_gone(fresh: Callable[..., Any], small_table: Table) -> None:
    model = fresh()
    head = model.get_output_embeddings()
    seen: list[tuple[int, ...]] = []
    handle = head.register_forward_hook(lambda _m, _a, output: seen.append(tuple(output.shape)))
    loss = SupervisedLoss(model, FLOAT32)
    _, tokens = loss(collate(small_table[:3], 2))
    handle.remove()
    assert seen == [(1, int(tokens.sum()), model.config.vocab_size)]
    assert not head._forward_pre_hooks
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[:2] == (1, 3)


def test_the_hook_is_gone_after_an_error(fresh: Callable[..., Any]) -> None:
    model = fresh()
    batch = collate([row([10**6, 5], [IGNORE, 5])], 2)
    with pytest.raises(IndexError):
        SupervisedLoss(model, FLOAT32)(batch)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_bfloat16_is_close_and_still_sums_in_float32(fresh: Callable[..., Any], small_table: Table) -> None:
    model = fresh()
    batch = collate(small_table[:4], 2)
    exact, _ = SupervisedLoss(model, FLOAT32)(batch)
    rough, _ = SupervisedLoss(model, Compute(torch.device("cpu"), torch.bfloat16))(batch)
    assert rough.dtype == torch.float32
    assert torch.allclose(exact, rough, rtol=0.02)
    assert not torch.equal(exact, rough)


def test_gradient_flows(fresh: Callable[..., Any], small_table: Table) -> None:
    model = fresh()
    nll, _ = SupervisedLoss(model, FLOAT32)(collate(small_table[:2], 2))
    nll.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


def test_model_without_an_output_layer() -> None:
    class Headless(nn.Module):
        def get_output_embeddings(self) -> None:
            return None

        def forward(self, input_ids: Tensor) -> Tensor:
            return F.one_hot(input_ids)

    with pytest.raises(ModelError, match="Headless has no output embeddings: not a causal language model"):
        SupervisedLoss(Headless(), FLOAT32)
