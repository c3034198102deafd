"""The engine's threads, and the model's code as it was once a pass is over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradpursuit.gradients import engine as engine_module
from gradpursuit.gradients.engine import FeatureEngine
from gradpursuit.gradients.per_example import PerExampleGradients
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.gradients.sketch import SparseSketch
from gradpursuit.trajectory.checkpoint import AdamState
from gradpursuit.trajectory.model import Compute, trainable


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_models_code_is_itself_after_the_block(tiny: Any) -> None:
    from transformers.models.llama import modeling_llama as code

    model = tiny.lora("llama")
    before = code.apply_rotary_pos_emb, code.eager_attention_forward
    with PerExampleGradients(model).capture(lambda *_: None):
        assert code.apply_rotary_pos_emb is not before[0]
        assert code.eager_attention_forward is not before[1]
        assert sum("forward" in module.__dict__ for module in model.modules()) == 14 + 5 + 2
    assert (code.apply_rotary_pos_emb, code.eager_attention_forward) == before
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_threads_give_what_one_gives(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, parts: int, precision: torch.dtype | None
) -> None:
    model, rows = tiny.lora("llama"), tiny.rows([9, 12, 5, 14, 14, 7, 11])
    shapes = {name: parameter.shape for name, parameter in trainable(model).items()}
    state = AdamState(
        {n: 1e-3 * random(*s) for n, s in shapes.items()},
        {n: 1e-6 * random(*s).square() for n, s in shapes.items()}, 3, 0.9, 0.999, 1e-8,
    )  # fmt: skip
    engine = FeatureEngine(model, Compute(torch.device("cpu"), precision), _sketch(model), 10**6)
    engine.prepare([Preconditioner("adam"), Preconditioner("identity")], state)
    alone = engine.batch(rows)
    monkeypatch.setattr(engine_module, "TOKENS_PER_PART", 1)
    taken: list[int] = []
    part = FeatureEngine._part

    def counted(self: FeatureEngine, rows: Any, width: int) -> Any:
        taken.append(len(rows))
        return part(self, rows, width)

    monkeypatch.setattr(FeatureEngine, "_part", counted)
    torch.set_num_threads(parts)
    try:
        together = engine.batch(rows)
        assert torch.get_num_threads() == parts
    finally:
        torch.set_num_threads(1)
    assert len(taken) == parts
    assert sum(taken) == len(rows)
    assert torch.equal(alone.tokens, together.tokens)
    assert torch.allclose(alone.loss, together.loss, rtol=1e-5)
    for a, b in zip(alone.kinds, together.kinds, strict=True):
        assert float((1 - F.cosine_similarity(a.features, b.features)).max()) < (1e-5 if precision is None else 1e-3)
        assert torch.allclose(a.norm, b.norm, rtol=1e-4 if precision is None else 0.02)


def test_an_error_in_a_thread_comes_through_and_leaves_the_model_as_it_was(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = tiny.lora("llama"), tiny.rows([9, 12])
    rows[1].input_ids[0] = 10**6  # no such token
    engine = FeatureEngine(model, Compute(torch.device("cpu"), None), _sketch(model), 10**6)
    engine.prepare([Preconditioner("identity")], AdamState({}, {}, 1, 0.9, 0.999, 1e-8))
    monkeypatch.setattr(engine_module, "TOKENS_PER_PART", 1)
    torch.set_num_threads(2)
    try:
        with pytest.raises(IndexError):
            engine.batch(rows)
    finally:
        torch.set_num_threads(1)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not model.get_output_embeddings()._forward_pre_hooks


def _sketch(model: Any) -> SparseSketch:
    return SparseSketch(PerExampleGradients(model).sizes, 64, 2, 5)
