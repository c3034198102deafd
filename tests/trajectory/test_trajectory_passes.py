"""Rows in one sequence and layers in fewer steps give the losses and gradients of each row alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from gradpursuit.config import LoraSection
from gradpursuit.data import IGNORE
from gradpursuit.trajectory import packed as packed_module
from gradpursuit.trajectory import passes as passes_module
from gradpursuit.trajectory.loss import padded_width
from gradpursuit.trajectory.model import Compute, attach_lora, trainable
from gradpursuit.trajectory.packed import (
    Layout,
    _attends_otherwise,
    can_pack,
    common_prefix,
    current_layout,
    divide,
    own_tokens,
    pack,
)
from gradpursuit.trajectory.passes import Passes
from gradpursuit.trajectory.pieces import Pieces
from gradpursuit.trajectory.threads import side_by_side
from gradpursuit.trajectory.training import TrainSpec, train
from tiny import randomize

FLOAT32 = Compute(torch.device("cpu"), None)
BFLOAT16 = Compute(torch.device("cpu"), torch.bfloat16)
KINDS = ["llama", "qwen2", "qwen2_moe"]


def row(ids: Sequence[int], labelled: int) -> SimpleNamespace:
    """A row whose last `labelled` tokens are supervised."""
    head = len(ids) - labelled
    return SimpleNamespace(input_ids=list(ids), labels=[IGNORE] * head + list(ids[head:]))


def alike(tiny: Any, lengths: Sequence[int], shared: int) -> list[Any]:
    """Random rows that begin with the same tokens."""
    rows = tiny.rows(lengths, prompt=0.5)
    for one in rows:
        one.input_ids[:shared] = rows[0].input_ids[:shared]
    return rows  # type: ignore[no-any-return]


def gradients(model: nn.Module, compute: Compute, rows: Sequence[Any], *, quick: bool) -> tuple[Tensor, list[Tensor]]:
    passes = Passes(model, compute)
    parameters = list(trainable(model).values())
    if not quick:
        losses = passes.predict(rows).losses()
        return losses.detach(), list(torch.autograd.grad(losses.sum(), parameters))
    with passes.quick():
        losses = passes.predict(rows).losses()
        return losses.detach(), list(torch.autograd.grad(losses.sum(), parameters))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("shared", [0, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_losses_and_gradients_that_they_have_alone(
    tiny: Any, kind: str, shared: int, quick: bool
) -> None:
    model, rows = tiny.lora(kind), alike(tiny, [20, 13, 17, 25], shared)
    assert common_prefix(rows) == (5 if shared else 0), "the shortest row is supervised from its seventh token on"
    expected = [tiny.oracle(model, one) for one in rows]
    losses, found = gradients(model, FLOAT32, rows, quick=quick)
    assert can_pack(model)
    torch.testing.assert_close(losses, torch.tensor([loss for loss, _ in expected]), rtol=1e-5, atol=1e-5)
    for (name, _), gradient in zip(trainable(model).items(), found, strict=True):
        exact = sum(single[name] for _, single in expected)
        assert float((gradient - exact).norm()) <= 1e-3 * float(exact.norm()), name


def built(kind: str) -> Any:
    """Tiny models of architectures that want something of their own, with a random adapter."""
    import transformers

    decoder = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 16}
    configs = {
        "gpt_neo": lambda: transformers.GPTNeoConfig(
            hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=12,
            vocab_size=97, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
        ),
        "minicpm3": lambda: transformers.MiniCPM3Config(**decoder, num_key_value_heads=4, **latent),
    }  # fmt: skip
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(configs[kind](), attn_implementation="eager")
    model.requires_grad_(False)
    return randomize(attach_lora(model.eval(), LoraSection(r=3, alpha=5), seed=0))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "gpt2", "gpt_neo", "minicpm3"])
def test_other_models_are_right_as_well(tiny: Any, kind: str) -> None:
    """They look at a window, have other shapes, or attention that is not recognised."""
    model = built(kind) if kind in ("gpt_neo", "minicpm3") else tiny.lora(kind)
    rows = alike(tiny, [20, 13, 17, 25], 7)
    assert can_pack(model) == (kind == "gpt2"), "its attention is not recognised, so it is padded all the same"
    losses, found = gradients(model, FLOAT32, rows, quick=True)
    expected = [tiny.oracle(model, one) for one in rows]
    torch.testing.assert_close(losses, torch.tensor([loss for loss, _ in expected]), rtol=1e-4, atol=1e-4)
    for (name, _), gradient in zip(trainable(model).items(), found, strict=True):
        exact = sum(single[name] for _, single in expected)
        assert float((gradient - exact).norm()) <= 1e-3 * float(exact.norm()), name


def test_a_model_that_mixes_its_rows_is_never_packed(tiny: Any) -> None:
    model = tiny.lora("llama")
    plain = type(model.base_model.model.model).forward

    def mixing(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("attention_mask", None)  # the sequence is taken for one row
        return plain(self, *args, **kwargs)

    inner = model.base_model.model.model
    inner.forward = mixing.__get__(inner)
    assert not can_pack(model)
    model = tiny.lora("llama")
    model.train()
    assert can_pack(model)
    assert model.training, "trying it out leaves the model as it was"


def test_a_norm_with_a_gate_keeps_its_own_code() -> None:
    class GatedRMSNorm(nn.Module):
        eps = 1e-6

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16), requires_grad=False)

        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            x = x if gate is None else x * gate
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    norm, x = GatedRMSNorm(), torch.randn(3, 16)
    exact = norm(x, gate=2 * x)
    pieces = Pieces(norm)
    assert len(pieces._norms) == 1
    with pieces.fused(lambda *_: None):
        assert torch.equal(norm(x, gate=2 * x), exact)


def test_what_a_configuration_says_of_distance_is_heeded() -> None:
    from transformers import Gemma3Config, LlamaConfig

    assert _attends_otherwise(Gemma3Config().get_text_config())
    assert not _attends_otherwise(LlamaConfig())
    assert _attends_otherwise(LlamaConfig(attention_window=7))
    assert _attends_otherwise(LlamaConfig(attention_layers=["global", "local"]))


def test_where_layers_drop_at_random_there_is_one_part(tiny: Any) -> None:
    model, rows = tiny.lora("llama"), alike(tiny, [60] * 8, 7)
    torch.set_num_threads(2)
    try:
        assert len(Passes(model, FLOAT32).parts(rows)) == 2
        model.base_model.model.model.layers[0].mlp.add_module("drop", nn.Dropout(0.1))
        assert len(Passes(model, FLOAT32).parts(rows)) == 1
    finally:
        torch.set_num_threads(1)


def test_a_layer_may_get_no_token_at_all(tiny: Any) -> None:
    model = tiny.lora("llama")
    with Passes(model, FLOAT32).quick():
        layer = model.base_model.model.model.layers[0].mlp.gate_proj
        x = torch.zeros(0, 32, requires_grad=True)
        y = layer(x)
        assert y.shape == (0, 48)
        assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 32)


def test_nothing_goes_on_once_one_part_has_failed() -> None:
    begun: list[int] = []

    def work(part: int) -> int:
        begun.append(part)
        if part == 1:
            raise ValueError("part 1")
        return part

    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="part 1"):
            list(side_by_side(work, 50))
        assert len(begun) <= 5
        first = side_by_side(lambda part: begun.append(part) or part, 50)
        begun.clear()
        assert next(first) == 0
        first.close()
        assert len(begun) <= 4
        assert torch.get_num_threads() == 2
        assert list(side_by_side(lambda part: part, 50)) == list(range(50))
    finally:
        torch.set_num_threads(1)


def test_bfloat16_rounds_no_more_than_the_models_own_code(tiny: Any) -> None:
    model = tiny.lora("llama")
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.mul_(0.1)  # a gentle model: what is measured is rounding
    rows = alike(tiny, [20, 13, 17, 25], 7)
    exact = torch.cat([g.flatten() for g in gradients(model, FLOAT32, rows, quick=False)[1]])
    errors = []
    for quick in (False, True):
        found = torch.cat([g.flatten() for g in gradients(model, BFLOAT16, rows, quick=quick)[1]])
        errors.append(float((found - exact).norm() / exact.norm()))
    assert 0 < errors[1] < 1.2 * errors[0]


def test_the_models_code_is_itself_after_the_block(tiny: Any) -> None:
    model, compute = tiny.lora("llama"), FLOAT32
    with Passes(model, compute).quick():
        assert sum("forward" in module.__dict__ for module in model.modules()) == 14 + 5 + 2 + 1
    assert not any("forward" in module.__dict__ for module in model.modules())
    with pytest.raises(IndexError), Passes(model, compute).quick():
        Passes(model, compute).predict([row([10**6, *range(3, 20)], 4)])  # no such token
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_trainable_layers_keep_their_own_code(tiny: Any) -> None:
    model, rows = tiny.plain("llama", "down_proj"), alike(tiny, [20, 13], 7)
    exact, found = gradients(model, FLOAT32, rows, quick=False), gradients(model, FLOAT32, rows, quick=True)
    torch.testing.assert_close(found[0], exact[0])
    for a, b in zip(found[1], exact[1], strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) > 0


def test_the_common_beginning_ends_before_what_predicts_a_label() -> None:
    first = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert common_prefix([row(first, 2), row([1, 2, 3, 4, 5, 60, 7, 8], 2)]) == 5
    assert common_prefix([row(first, 2), row(first, 2)]) == 6, "token 7 is labelled, token 6 predicts it"
    assert common_prefix([row(first, 2), row([1, 2, 3, 9, 9], 1)]) == 0, "three tokens are not worth it"
    assert common_prefix([row(first, 2)]) == 0
    assert common_prefix([row(first, 9), row(first, 9)]) == 0


def test_a_sequence_holds_every_token_at_its_place() -> None:
    rows = [row([1, 2, 3, 4, 10, 11, 12], 2), row([1, 2, 3, 4, 20, 21], 1)]
    batch, layout = pack(rows, 99)
    assert (layout.shared, layout.used, layout.size) == (4, 9, padded_width(9))
    assert batch["input_ids"][0, :10].tolist() == [1, 2, 3, 4, 10, 11, 12, 20, 21, 99]
    assert batch["position_ids"][0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert batch["targets"][0, :9].tolist() == [IGNORE] * 4 + [11, 12, IGNORE, 21, IGNORE]
    assert batch["row"][0, 4:9].tolist() == [0, 0, 0, 1, 1]
    seen = (batch["attention_mask"][0, 0] == 0)[:9, :9].nonzero().tolist()
    expected = [[i, j] for i in range(4) for j in range(i + 1)]
    expected += [[i, j] for i in range(4, 7) for j in [*range(4), *range(4, i + 1)]]
    expected += [[i, j] for i in range(7, 9) for j in [*range(4), *range(7, i + 1)]]
    assert seen == expected
    assert own_tokens(rows) == [3, 2]
    assert layout.own.tolist() == [[4, 5, 6], [7, 8, 0]]
    assert layout.real.sum(dim=1).tolist() == [3, 2]
    assert layout.own.flatten()[layout.place[:5]].tolist() == list(range(4, 9))
    assert (layout.mask[0] == 0).sum(dim=1).tolist() == [5, 6, 7]
    assert (layout.before[0] == 0).sum(dim=1).tolist() == [1, 2, 3, 4]


def test_the_layout_is_that_of_the_calling_thread() -> None:
    layout = Layout(0, [3, 5], 8)
    with layout.in_use():
        assert current_layout(8) is layout
        assert current_layout(16) is None
        torch.set_num_threads(2)
        try:
            assert list(side_by_side(lambda _part: current_layout(8), 2)) == [None, None]
        finally:
            torch.set_num_threads(1)
    assert current_layout(8) is None


def test_parts_are_even_and_whole() -> None:
    sizes = [50, 3, 7, 40, 11, 9]
    groups = divide(sizes, 2)
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert [sum(sizes[i] for i in group) for group in groups] == [59, 61]
    assert divide([5], 1) == [[0]]
    assert divide([5, 5], 4) == [[0], [1]]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_scores_do_not_depend_on_threads_or_groups(tiny: Any, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    model, rows = tiny.lora("llama"), alike(tiny, [20, 13, 17, 25, 11, 14, 30], 5)
    expected = torch.tensor([tiny.oracle(model, one)[0] for one in rows])
    monkeypatch.setattr(passes_module, "_PACKED", 40)
    torch.set_num_threads(threads)
    try:
        for groups in ((), [[0, 6], [1, 2, 3], [5, 4]]):
            found = torch.zeros(len(rows))
            batches = 0
            for indices, said in Passes(model, FLOAT32).scored(rows, groups):
                found[list(indices)] = said.losses()
                assert [len(tokens) for tokens in said.likely()] == said.tokens.tolist()
                batches += 1
            assert batches > 2
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


def test_a_base_model_is_tried_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = tiny.lora("llama"), []
    real = packed_module._same_in_one_sequence
    monkeypatch.setattr(packed_module, "_same_in_one_sequence", lambda m: tried.append(m) or real(m))
    assert can_pack(model)
    assert can_pack(model)
    assert len(tried) == 1


def test_pieces_are_found_inside_inference_mode(tiny: Any) -> None:
    model = tiny.lora("llama")
    with torch.inference_mode():
        pieces = Pieces(model)
    assert (len(pieces._norms), len(pieces._gates), len(pieces._functions)) == (5, 2, 2)


def test_norms_that_are_trained_keep_their_own_code(tiny: Any) -> None:
    model = tiny.lora("llama")
    model.base_model.model.model.norm.weight.requires_grad_(True)
    assert len(Pieces(model)._norms) == 4


@pytest.mark.parametrize("threads", [1, 3])
def test_a_training_step_has_the_gradient_of_the_weighted_batch(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    model, rows, weights = tiny.lora("llama"), alike(tiny, [20, 13, 17, 25, 11], 5), [0.5, 2.0, 1.0, 0.25, 1.25]
    expected = {name: torch.zeros_like(parameter) for name, parameter in trainable(model).items()}
    for weight, one in zip(weights, rows, strict=True):
        for name, gradient in tiny.oracle(model, one)[1].items():
            expected[name] += weight * gradient / len(rows)
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    parts: list[int] = []
    found: dict[str, Tensor] = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *_args: Any, **_kwargs: Any) -> None:
            found.update((name, parameter.grad.clone()) for name, parameter in trainable(model).items())

    def counted(self: Passes, rows: Any) -> Any:
        parts.append(len(rows))
        return predict(self, rows)

    predict = Passes.predict
    monkeypatch.setattr(Passes, "predict", counted)
    monkeypatch.setattr(passes_module, "_PART", 1)
    torch.set_num_threads(threads)
    try:
        train(model, rows, TrainSpec(1, len(rows), 1e-3, 0, "one step"), FLOAT32, weights=weights, callbacks=[Watch()])
    finally:
        torch.set_num_threads(1)
    assert (len(parts), sum(parts)) == (threads, len(rows))
    for name, gradient in found.items():
        exact = expected[name] / max(1.0, float(norm))  # the Trainer clips to length 1
        assert float((gradient - exact).norm()) <= 2e-3 * float(exact.norm()), name
    assert found.keys() == expected.keys()
