"""Per-example gradients against a loop of batch-of-one autograd, for every LoRA matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradpursuit.config import LoraSection, ModelSection
from gradpursuit.data import Renderer, Row
from gradpursuit.errors import ModelError
from gradpursuit.gradients.per_example import PerExampleGradients
from gradpursuit.trajectory.loss import SupervisedLoss, collate
from gradpursuit.trajectory.model import Compute, attach_lora, load_model, load_tokenizer, trainable

FLOAT32 = Compute(torch.device("cpu"), None)
TOLERANCE = 1e-4


def per_example(model: Any, rows: list[Row]) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of all rows in one batch, by the hooks."""
    found: dict[str, Tensor] = {}

    def consume(name: str, gradient: Tensor) -> None:
        assert name not in found, f"{name} delivered twice"
        found[name] = gradient.clone()

    engine = PerExampleGradients(model)
    with engine.capture(consume):
        losses, _ = SupervisedLoss(model, FLOAT32)(collate(rows, 0))
        losses.sum().backward()
    model.zero_grad(set_to_none=True)
    assert set(found) == set(engine.sizes) == set(trainable(model))
    return losses.detach(), found


def assert_matches_oracle(tiny: Any, model: Any, rows: list[Row], tolerance: float = TOLERANCE) -> None:
    losses, found = per_example(model, rows)
    for index, row in enumerate(rows):
        loss, expected = tiny.oracle(model, row)
        assert float(losses[index]) == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            assert gradient.norm() > 0, f"the oracle's gradient of {name} is zero: the test would prove nothing"
            error = (found[name][index] - gradient).norm() / gradient.norm()
            assert error <= tolerance, f"row {index}, {name}: relative error {error:.2e}"


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        *((kind, attention) for kind in ("llama", "gpt2", "qwen2", "gemma3") for attention in ("eager", "sdpa")),
        ("gemma2", "eager"),  # the only implementation that soft-caps the attention scores
    ],
)
def test_every_matrix_equals_autograd(tiny: Any, kind: str, attention: str) -> None:
    model = tiny.lora(kind, attention)
    assert model.config._attn_implementation == attention
    assert_matches_oracle(tiny, model, tiny.rows([12, 5, 19, 12]))


@pytest.mark.parametrize(
    ("kind", "pattern", "count"),
    [
        ("llama", r"layers\.\d\.(self_attn|mlp)\.", 14),
        ("llama", r"layers\.1\.mlp\.down_proj", 1),
        ("gpt2", r"h\.\d\.(attn|mlp)\.", 8),
        ("qwen2", r"q_proj|o_proj", 4),
        ("gemma3", r"layers\.0\.", 7),
    ],
)
def test_weights_of_plain_linear_layers_equal_autograd(tiny: Any, kind: str, pattern: str, count: int) -> None:
    model = tiny.plain(kind, pattern)
    assert len(trainable(model)) == count
    assert_matches_oracle(tiny, model, tiny.rows([12, 5, 19, 12]))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rank_stabilised_adapters_equal_autograd(tiny: Any, kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = tiny.randomize(get_peft_model(tiny.base(kind), settings))
    scalings = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
    assert scalings == {3.0}  # 6 / √4, which plain LoRA would make 6 / 4
    assert_matches_oracle(tiny, model, tiny.rows([12, 5, 19]))


def test_no_gradient_is_left_in_the_parameters(tiny: Any) -> None:
    model = tiny.lora("llama")
    with PerExampleGradients(model).capture(lambda *_: None):
        losses, _ = SupervisedLoss(model, FLOAT32)(collate(tiny.rows([9, 4]), 0))
        losses.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_changed_weights_are_noticed(tiny: Any) -> None:
    """W + sBA is kept between batches, but never longer than it is true."""
    model, rows = tiny.lora("llama"), tiny.rows([9, 4])
    engine = PerExampleGradients(model)
    found: dict[str, Tensor] = {}
    for seed in (3, 4):
        tiny.randomize(model, seed)
        with engine.capture(found.__setitem__):
            losses, _ = SupervisedLoss(model, FLOAT32)(collate(rows, 0))
            losses.sum().backward()
        loss, expected = tiny.oracle(model, rows[0])
        assert float(losses[0].detach()) == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            assert (found[name][0] - gradient).norm() <= TOLERANCE * gradient.norm(), (seed, name)


def test_layers_below_the_first_followed_one_are_not_gone_through(tiny: Any) -> None:
    model = tiny.plain("llama", r"layers\.1\.mlp\.down_proj")
    reached: list[str] = []
    below = model.model.layers[0].mlp.down_proj
    below.register_forward_hook(lambda _module, _args, output: reached.append(str(output.requires_grad)))
    per_example(model, tiny.rows([7]))
    assert reached == ["False"]


def test_bfloat16_stays_close_to_float32(tiny: Any) -> None:
    model, rows = tiny.lora("llama"), tiny.rows([12, 5, 19])
    _, exact = per_example(model, rows)
    half = Compute(torch.device("cpu"), torch.bfloat16)
    found: dict[str, Tensor] = {}
    with PerExampleGradients(model, torch.bfloat16).capture(found.__setitem__):
        losses, _ = SupervisedLoss(model, half)(collate(rows, 0))
        losses.sum().backward()
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    for index in range(len(rows)):
        a, b = (torch.cat([values[name][index].flatten() for name in exact]).double() for values in (exact, found))
        cosine = float(a @ b / a.norm() / b.norm())
        assert 1e-9 < 1 - cosine < 1e-3, f"row {index}: 1 - cos {1 - cosine:.1e}"


def test_two_modules_that_share_a_weight_count_as_one(tiny: Any) -> None:
    model = tiny.plain("llama", r"layers\.\d\.self_attn\.q_proj")
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    second.weight = first.weight
    assert len(trainable(model)) == 1
    assert_matches_oracle(tiny, model, tiny.rows([12, 5]))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_soft_capping_is_part_of_what_is_tested(tiny: Any, kind: str) -> None:
    """Without the cap the loss is another one: the oracle above would notice its absence."""
    model, rows = tiny.lora(kind), tiny.rows([12])
    capped, _ = tiny.oracle(model, rows[0])
    model.config.final_logit_softcapping = None
    free, _ = tiny.oracle(model, rows[0])
    assert abs(capped - free) > 1e-3 * free


def test_all_linear_layers_are_covered(tiny: Any) -> None:
    names = set(PerExampleGradients(tiny.lora("llama")).sizes)
    assert len(names) == 2 * 7 * 2  # two layers, seven projections, A and B
    assert {name.rsplit(".", 2)[1] for name in names} == {"lora_A", "lora_B"}


def test_batch_composition_order_and_padding_change_nothing(tiny: Any) -> None:
    model = tiny.lora("llama")
    rows = tiny.rows([7, 4, 30, 9])
    _, alone = per_example(model, rows[:1])
    for others in ([0, 1], [0, 2], [3, 2, 0], [1, 0, 3, 2], [0, 0, 0]):
        _, together = per_example(model, [rows[i] for i in others])
        for name, expected in alone.items():
            for place in (place for place, i in enumerate(others) if i == 0):
                difference = (together[name][place] - expected[0]).norm()
                assert difference <= 1e-5 * expected[0].norm(), (others, name)


@pytest.mark.parametrize("pad_id", [0, 50])
def test_pad_token_itself_does_not_matter(tiny: Any, pad_id: int) -> None:
    model = tiny.lora("gpt2")
    short, long = tiny.rows([6, 20])
    collected: dict[str, Tensor] = {}
    with PerExampleGradients(model).capture(collected.__setitem__):
        losses, _ = SupervisedLoss(model, FLOAT32)(collate([short, long], pad_id))
        losses.sum().backward()
    _, expected = tiny.oracle(model, short)
    for name, gradient in expected.items():
        assert (collected[name][0] - gradient).norm() <= TOLERANCE * gradient.norm()


class TwiceModel(nn.Module):
    """A causal model whose one adapted layer is used twice in a forward pass, and once more for nothing."""

    def __init__(self, *, waste: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 8)
        self.shared = nn.Linear(8, 8, bias=False)
        self.other = nn.Linear(8, 8)
        self.head = nn.Linear(8, 40, bias=False)
        self.waste = waste

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        from types import SimpleNamespace

        hidden = self.embed(input_ids)
        if self.waste:
            self.shared(hidden)
        hidden = torch.tanh(self.shared(hidden))
        hidden = torch.tanh(self.other(hidden) + self.shared(hidden))
        return SimpleNamespace(logits=self.head(hidden))


@pytest.mark.parametrize("waste", [False, True], ids=["twice", "twice and once unused"])
def test_module_used_twice_counts_every_use(tiny: Any, waste: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = TwiceModel(waste=waste).requires_grad_(False)
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["shared", "other"]), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    tiny.randomize(model)
    rows = tiny.rows([9, 14], vocabulary=40)
    losses, found = per_example(model, rows)
    assert any(name.startswith("shared.lora_B") for name in found)
    for index, row in enumerate(rows):
        model.zero_grad(set_to_none=True)
        loss, _ = SupervisedLoss(model, FLOAT32)(collate([row], 0))
        loss.sum().backward()
        assert float(loss.detach()) == pytest.approx(float(losses[index]), rel=1e-5)
        for name, parameter in trainable(model).items():
            assert (found[name][index] - parameter.grad).norm() <= TOLERANCE * parameter.grad.norm(), name


def test_the_model_is_itself_after_the_block_even_after_an_error(tiny: Any) -> None:
    model = tiny.lora("llama")
    engine = PerExampleGradients(model)
    calls: list[str] = []
    with pytest.raises(RuntimeError, match="stop"), engine.capture(lambda name, _: calls.append(name)):
        raise RuntimeError("stop")
    losses, _ = SupervisedLoss(model, FLOAT32)(collate(tiny.rows([6]), 0))
    losses.sum().backward()
    assert calls == []
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_tokens_without_their_example_are_refused(tiny: Any) -> None:
    """A mixture of experts flattens the batch before its shared expert: rows can no longer be told apart."""
    model = tiny.lora("qwen2_moe")
    with pytest.raises(ModelError, match=r"shared_expert.*target_modules"):
        per_example(model, tiny.rows([6, 9]))


@pytest.mark.real_model
def test_real_model_equals_autograd(tiny: Any, smollm2_path: Any) -> None:
    config = ModelSection(path=str(smollm2_path), device="cpu", precision="float32")
    renderer = Renderer(load_tokenizer(config))
    model = tiny.randomize(attach_lora(load_model(config), LoraSection(r=4), seed=0))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.mul_(0.05)  # random adapters of full size drown what the model knows
    texts = [("Count: apple, pear.", "2"), ("Say hello in French.", "Bonjour ! 👋"), ("2+2?", "The answer is 4.")]
    rows = []
    for number, (prompt, answer) in enumerate(texts):
        rendered = renderer([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
        rows.append(Row(str(number), "", "", 0, "{}", rendered.input_ids, rendered.labels))
    assert_matches_oracle(tiny, model, rows)


def _refused(base: Any, **options: Any) -> str:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    with pytest.raises(ModelError) as caught:
        PerExampleGradients(model)
    message = str(caught.value)
    assert "use plain LoRA" in message
    return message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "lora_magnitude_vector"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}, "down_proj"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "bias"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "bias"),
    ],
    ids=["DoRA", "saved head", "saved linear", "embedding", "adapted head", "biases", "LoRA bias"],
)
def test_other_adapters_are_refused(tiny: Any, options: dict[str, Any], named: str) -> None:
    base = tiny.base("qwen2")
    assert named in _refused(base, **options) or named == "bias"


def test_nothing_of_a_batch_stays_in_memory(tiny: Any) -> None:
    """The graph of a pass refers to what the pass keeps: kept tensors would keep the whole graph, batch after batch."""
    import gc
    import weakref

    model = tiny.lora("llama")
    seen: list[weakref.ref[Tensor]] = []
    for layer in model.base_model.model.model.layers:
        layer.mlp.register_forward_hook(lambda _module, args, _output: seen.append(weakref.ref(args[0])))
        layer.mlp.down_proj.register_forward_pre_hook(lambda _module, args: seen.append(weakref.ref(args[0])))
    half = Compute(torch.device("cpu"), torch.bfloat16)
    with PerExampleGradients(model, torch.bfloat16).capture(lambda *_: None):
        losses, _ = SupervisedLoss(model, half)(collate(tiny.rows([9, 4]), 0))
        losses.sum().backward()
    assert len(seen) == 4
    del losses
    gc.collect()
    assert [ref() for ref in seen] == [None] * 4
