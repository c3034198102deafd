"""What is trained comes and goes, and leaves the base model as it was; what cannot be followed is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from gradpursuit.config import LoraSection, ModelSection
from gradpursuit.errors import ConfigError, ModelError, TrajectoryError
from gradpursuit.trajectory.followed import followed_layers
from gradpursuit.trajectory.model import load_model, trainable
from gradpursuit.trajectory.tuning import adapter_settings, tuned

DOWN = r".*mlp\.down_proj"


@pytest.fixture
def base(tiny_config: ModelSection) -> Any:
    return load_model(tiny_config)


def gpt2() -> Any:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=64))
    return model.requires_grad_(False).eval()


def shape_of(model: Any) -> tuple[Any, ...]:
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        model.training,
    )


def disturb(model: Any) -> None:
    """Train every trainable parameter by one large step."""
    model.train()
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(1.0)


@pytest.mark.parametrize(
    "settings", [{}, {"lora": {"rslora": True}}, {"layers": DOWN}], ids=["lora", "rslora", "layers"]
)
@pytest.mark.parametrize("fails", [False, True])
def test_the_base_model_is_as_before(base: Any, settings: dict[str, Any], fails: bool) -> None:
    before, shape = {k: v.clone() for k, v in base.state_dict().items()}, shape_of(base)
    for _ in range(2):
        try:
            with tuned(base, ModelSection(path="x", **settings), seed=1) as model:
                assert trainable(model)
                disturb(model)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert shape_of(base) == shape
        assert list(before) == list(base.state_dict())
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_layers_are_trained_by_their_own_names(base: Any) -> None:
    with tuned(base, ModelSection(path="x", layers=DOWN), seed=0) as model:
        assert model is base
        assert list(trainable(model)) == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
        followed_layers(model)
    other = gpt2()
    with tuned(other, ModelSection(path="x", layers=r"transformer\.h\.\d+\.attn\.c_(attn|proj)"), seed=0) as model:
        names = list(trainable(model))
    assert names == [f"transformer.h.{i}.attn.{c}.weight" for i in (0, 1) for c in ("c_attn", "c_proj")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing", r"model\.layers = 'nothing' matches no linear layer of LlamaForCausalLM; .*model\.layers\.0\.self"),
        ("down_proj", "the expression must match the whole name"),
        (".*", r"matches \d+ modules .*cannot be followed \(such as model\.embed_tokens \(Embedding\)"),
        (r".*norm", r"model\.layers\.0\.input_layernorm \(LlamaRMSNorm\)"),
        ("lm_head", r"lm_head \(Linear\)\).*not the output layer"),
        (r".*self_attn\.(rotary.*|nothing)", "matches no linear layer"),
    ],
)
def test_layers_that_cannot_be_followed(base: Any, pattern: str, message: str) -> None:
    with pytest.raises(ModelError, match=message), tuned(base, ModelSection(path="x", layers=pattern), 0):
        pass
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("settings", [{"layers": r"([\w.]+)*!"}, {"lora": LoraSection(target_modules=r"([\w.]+)*!")}])
def test_an_expression_that_would_take_forever_is_refused(
    base: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradpursuit.trajectory.expressions._SECONDS", 1.0)
    with pytest.raises(ConfigError, match="takes more than 1 s"), tuned(base, ModelSection(path="x", **settings), 0):
        pass
    with tuned(base, ModelSection(path="x", lora=LoraSection(target_modules=r".*\.(q|v)_proj")), 0) as model:
        assert {name.split(".")[-3] for name in trainable(model)} == {"q_proj", "v_proj"}


def test_the_ranks_of_a_stranger_that_would_take_forever_are_refused(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradpursuit.trajectory.expressions._SECONDS", 1.0)
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "rank_pattern": {r"([\w.]+)*!": 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    message = r"adapter_config\.json: this regular expression takes more than 1 s"
    with pytest.raises(ConfigError, match=message), tuned(base, ModelSection(path="x"), 0, tmp_path):
        pass


@pytest.mark.parametrize("modules", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_adapters_outside_the_linear_layers(base: Any, modules: list[str]) -> None:
    config = ModelSection(path="x", lora=LoraSection(target_modules=modules))
    shape = shape_of(base)
    with (
        pytest.raises(ModelError, match=r"\d trainable parameters cannot be followed \(first: '"),
        tuned(base, config, 0),
    ):
        pass
    assert shape_of(base) == shape


def test_a_whole_model_cannot_be_followed(base: Any) -> None:
    with pytest.raises(ModelError, match="no trainable parameters"):
        followed_layers(base)
    with pytest.raises(ModelError, match=r"trainable parameters cannot be followed .*norms, embeddings"):
        followed_layers(base.requires_grad_(True))


@pytest.mark.parametrize("options", [{"modules_to_save": ["down_proj"]}, {"use_dora": True}, {"lora_bias": True}])
def test_what_the_gradients_would_refuse_is_refused_before_training(base: Any, options: dict[str, Any]) -> None:
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options))
    with pytest.raises(ModelError, match=r"trainable parameters cannot be followed .*use plain LoRA"):
        followed_layers(model)


def test_rslora_scales_by_the_root(base: Any) -> None:
    for rslora, scale in ((False, 16 / 4), (True, 16 / math.sqrt(4))):
        config = ModelSection(path="x", lora=LoraSection(r=4, alpha=16, rslora=rslora))
        with tuned(base, config, 0) as model:
            scalings = {m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)}
        assert scalings == {scale}


@pytest.fixture
def saved(base: Any, tmp_path: Path) -> Callable[..., Path]:
    """Saves an adapter as `peft` does and returns its folder."""

    def save(**settings: Any) -> Path:
        config = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, **settings}
        model = get_peft_model(base, LoraConfig(**config))
        model.save_pretrained(tmp_path / "adapter")
        model.unload()
        return tmp_path / "adapter"

    return save


def test_settings_come_from_the_folder(base: Any, saved: Callable[..., Path]) -> None:
    folder = saved(use_rslora=True, rank_pattern={"v_proj": 2}, task_type="CAUSAL_LM", init_lora_weights="gaussian")
    with tuned(base, ModelSection(path="x"), 0, folder) as model:
        shapes = {name.split("self_attn.")[1]: tuple(p.shape) for name, p in trainable(model).items()}
        assert model.peft_config["default"].use_rslora
        dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert shapes["q_proj.lora_A.weight"] == (3, 32)
    assert shapes["v_proj.lora_B.weight"] == (16, 2)
    assert not dropouts
    assert adapter_settings(folder).lora_alpha == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True cannot be followed; train a plain LoRA adapter, without use_dora"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] cannot be followed"),
        ({"bias": "all"}, "bias = 'all' cannot be followed; train with bias='none'"),
        ({"lora_bias": True}, "lora_bias = True cannot be followed"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes the base model's weights"),
    ],
)
def test_settings_that_cannot_be_followed(saved: Callable[..., Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrajectoryError, match=r"adapter_config\.json: " + message):
        adapter_settings(saved(**settings))


def test_settings_of_other_kinds_or_broken(saved: Callable[..., Path]) -> None:
    folder = saved()
    path = folder / "adapter_config.json"
    whole = json.loads(path.read_text())
    for text, message in (
        (json.dumps({**whole, "peft_type": "LOHA"}), "peft_type is 'LOHA'; only LORA"),
        (json.dumps({**whole, "of_the_future": 3}), "of_the_future = 3 cannot be followed"),
        ("[]", "not the settings of an adapter"),
        ("{", "adapter_config.json: damaged, it is not the JSON that was written"),
    ):
        path.write_text(text)
        with pytest.raises(TrajectoryError, match=message):
            adapter_settings(folder)
    path.unlink()
    with pytest.raises(TrajectoryError, match=r"adapter_config\.json: not there; .*model\.layers"):
        adapter_settings(folder)
