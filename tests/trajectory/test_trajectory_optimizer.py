"""Adam's moments out of what real trainers save, against the optimizer that was at work; all else is refused."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from foreign import assert_same_moments, run_trainer
from gradpursuit.config import ModelSection
from gradpursuit.errors import TrajectoryError
from gradpursuit.trajectory.model import load_model, plain_name, trainable
from gradpursuit.trajectory.optimizer import adam_state, live_state
from gradpursuit.trajectory.optimizer_files import NoMomentsError, SavedOptimizer, read_optimizer
from gradpursuit.trajectory.tuning import tuned

Fresh = Callable[..., Any]


class NormedProjection(nn.Linear):
    """A linear layer whose place in the model has `norm` in its name, so that a Trainer does not decay it."""


def renamed(model: Any) -> Any:
    """The model with some projections moved to names that a Trainer does not decay, between those that it does."""
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_norm = NormedProjection(32, 32, bias=False)
        plain = attention.o_proj.forward
        attention.o_proj.forward = lambda x, f=plain, a=attention: f(x) + a.q_norm(x)
    return model.requires_grad_(False)


def test_trainer_checkpoint_of_an_adapter(fresh: Fresh, tmp_path: Path) -> None:
    model = fresh()
    watch = run_trainer(model, tmp_path)
    for step in (2, 4, 6):
        saved = read_optimizer(tmp_path / f"checkpoint-{step}")
        assert [len(group["params"]) for group in saved.groups] == [28, 0]
        state = adam_state(saved, model)
        assert_same_moments(state, watch.moments[step])
        assert (state.step, state.beta1, state.beta2, state.eps) == (step, 0.9, 0.999, 1e-8)


@pytest.mark.parametrize("kind", ["lora", "layers"])
def test_the_groups_of_the_trainer_are_undone(tiny_config: ModelSection, tmp_path: Path, kind: str) -> None:
    """Two groups, whose parameters lie between one another in the model, and have the same shapes."""
    base = renamed(load_model(tiny_config))
    if kind == "lora":
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "q_norm", "o_proj", "down_proj"]))
        watch = run_trainer(model, tmp_path)
    else:
        config = ModelSection(path="x", layers=r".*self_attn\.(q_proj|q_norm|o_proj)")
        with tuned(base, config, 0) as model:
            watch = run_trainer(model, tmp_path)
        for module in base.modules():
            module.requires_grad_(isinstance(module, NormedProjection))
        for layer in base.model.layers:
            layer.self_attn.q_proj.requires_grad_(True)
            layer.self_attn.o_proj.requires_grad_(True)
    saved = read_optimizer(tmp_path / "checkpoint-4")
    sizes = [len(group["params"]) for group in saved.groups]
    assert min(sizes) > 0
    names = list(trainable(model))
    decayed = [name for name in names if "norm" not in name]
    assert names != decayed + [name for name in names if "norm" in name]
    assert sizes == [len(decayed), len(names) - len(decayed)]
    assert_same_moments(adam_state(saved, model), watch.moments[4])


@pytest.mark.parametrize("what", ["norm", "layers"])
def test_more_was_trained_than_is_followed(tiny_config: ModelSection, tmp_path: Path, what: str) -> None:
    base = load_model(tiny_config)
    more = [name for name, _ in base.named_parameters() if "down_proj" in name or (what == "norm" and "norm" in name)]
    more += [name for name, _ in base.named_parameters() if what == "layers" and "up_proj" in name]
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in more)
    run_trainer(base, tmp_path, max_steps=2)
    base.requires_grad_(False)
    found = "2 and 5" if what == "norm" else "4 and 0"
    with (
        tuned(base, ModelSection(path="x", layers=r".*down_proj"), 0) as model,
        pytest.raises(
            TrajectoryError, match=rf"groups of {found} parameters; .*makes groups of 2 and 0\. Either other"
        ),
    ):
        adam_state(read_optimizer(tmp_path / "checkpoint-2"), model)


def test_an_adapter_of_another_shape(fresh: Fresh, tmp_path: Path) -> None:
    run_trainer(fresh(r=4), tmp_path, max_steps=2)
    saved = read_optimizer(tmp_path / "checkpoint-2")
    with pytest.raises(
        TrajectoryError, match=r"exp_avg of 'base_model.*' has shape \(4, 32\), the parameter has \(2, 32"
    ):
        adam_state(saved, fresh(r=2))
    with pytest.raises(TrajectoryError, match=r"groups of 28 and 0 parameters; .* groups of 4 and 0"):
        adam_state(saved, fresh(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("optim", "found"),
    [
        ("sgd", "no Adam moments: the optimizer keeps nothing, as SGD does|momentum_buffer"),
        ("adafactor", "the factored second moments of Adafactor"),
        ("rmsprop", r"no Adam moments: the optimizer keeps square_avg, step"),
    ],
)
def test_optimizers_without_adam_moments(fresh: Fresh, tmp_path: Path, optim: str, found: str) -> None:
    model = fresh()
    run_trainer(model, tmp_path, max_steps=2, optim=optim)
    with pytest.raises(NoMomentsError, match=rf"optimizer\.pt: ({found}).*; .*adamw_torch.*preconditioner: identity"):
        adam_state(read_optimizer(tmp_path / "checkpoint-2"), model)


def test_quantized_states(fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of bitsandbytes and the class of torchao, neither of which runs everywhere."""
    model = fresh()
    value = torch.zeros(4, dtype=torch.uint8)
    entry = {"step": 1, "state1": value, "state2": value, "qmap1": value, "qmap2": value, "absmax1": value}
    state = dict.fromkeys(range(28), entry)
    groups = [{"params": list(range(28)), "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}]
    torch.save({"state": state, "param_groups": groups}, tmp_path / "optimizer.pt")
    with pytest.raises(NoMomentsError, match=r"the state of a bitsandbytes optimizer .*adamw_torch"):
        adam_state(read_optimizer(tmp_path), model)
    low = types.ModuleType("torchao.optim.subclass_8bit")
    low.OptimState8bit = type("OptimState8bit", (dict,), {"__module__": low.__name__})  # type: ignore[attr-defined]
    for name in ("torchao", "torchao.optim", low.__name__):
        monkeypatch.setitem(sys.modules, name, low)
    torch.save({"state": {0: {"exp_avg": low.OptimState8bit()}}, "param_groups": groups}, tmp_path / "optimizer.pt")
    with pytest.raises(NoMomentsError, match="low-bit state of a torchao optimizer"):
        read_optimizer(tmp_path)


def test_files_that_are_missing_broken_or_sharded(tmp_path: Path) -> None:
    with pytest.raises(NoMomentsError, match=r"no optimizer state there .*save_only_model=True"):
        read_optimizer(tmp_path)
    for name, what in (
        ("global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed ZeRO"),
        ("optimizer_0_rank0.bin", "one file per process"),
        ("rank0-of-2-optimizer.pt", "XLA"),
    ):
        folder = tmp_path / what
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"x")
        with pytest.raises(NoMomentsError, match=f"{what}.*cannot be put together here"):
            read_optimizer(folder)
    for content, message in (
        (b"", "cannot be read"),
        (b"no pickle", "cannot be read"),
        ({"a": 1}, "not the state of an optimizer: .* found a"),
        ([1], ".*found list"),
        ({"state": {}, "x": Path("p")}, "cannot be read"),
    ):
        path = tmp_path / "optimizer.bin"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(TrajectoryError, match=rf"optimizer\.bin: {message}"):
            read_optimizer(tmp_path)
    (tmp_path / "optimizer.bin").unlink()
    (tmp_path / "optimizer_0").mkdir()
    (tmp_path / "optimizer_0" / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(TrajectoryError, match=r"optimizer_0: cannot be read: os\.system is no part of an index"):
        read_optimizer(tmp_path)


def stepped(model: nn.Module) -> Any:
    """AdamW over the trainable parameters, in the groups of a Trainer, after two steps on random tokens."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)  # at zero, lora_A has no gradient
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": parameters[1:]}, {"params": parameters[:1], "weight_decay": 0.0}], lr=1e-2
    )
    for _ in range(2):
        ids = torch.randint(3, 60, (2, 6))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save_distributed(state: Any, folder: Path) -> None:
    """As accelerate does with SHARDED_STATE_DICT."""
    writer = dcp.FileSystemWriter(folder / "optimizer_0")
    dcp.save({"optimizer": state}, storage_writer=writer, planner=dcp.DefaultSavePlanner())


def check_named(model: Any, expected: Any, folder: Path) -> None:
    """Read without a process group and compare."""
    state = adam_state(read_optimizer(folder), model)
    assert set(state.m) == set(trainable(model))
    for name in state.m:
        assert torch.equal(state.m[name], expected[name][0])
        assert torch.equal(state.v[name], expected[name][1])
        assert state.v[name].any()
    assert (state.step, state.beta1, state.beta2, state.eps) == (2, 0.9, 0.999, 1e-8)


@pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_named_states(tmp_path: Path, process_group: None, sharded: bool, flat: bool) -> None:
    """Of FSDP 2: its parameters are sharded tensors."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(untied(), mesh=init_device_mesh("cpu", (1,)))
    optimizer = stepped(model)
    assert "DTensor" in {type(p).__name__ for p in trainable(model).values()}
    live = live_state(model, optimizer)
    expected = {name: (live.m[name].full_tensor(), live.v[name].full_tensor()) for name in live.m}
    options = StateDictOptions(flatten_optimizer_state_dict=flat, full_state_dict=not sharded)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    save_distributed(state, tmp_path) if sharded else torch.save(state, tmp_path / "optimizer.bin")
    dist.destroy_process_group()
    try:
        check_named(untied(), expected, tmp_path)
    finally:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'again'}", rank=0, world_size=1)


def untied() -> Any:
    """A tiny adapted Llama whose output layer is its own, as FSDP 1 wants it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sharded", [False, True], ids=["full", "sharded"])
def test_fully_sharded_modules(tmp_path: Path, process_group: None, sharded: bool) -> None:
    """FSDP 1, each decoder layer wrapped; the file holds plain names, whatever the wrappers add."""
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    model, plain = untied(), untied()
    layer = type(model.base_model.model.model.layers[0])
    cpu = torch.device("cpu")
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({layer}), use_orig_params=True, device_id=cpu
    )
    optimizer = stepped(wrapped)
    kind = StateDictType.SHARDED_STATE_DICT if sharded else StateDictType.FULL_STATE_DICT
    with FullyShardedDataParallel.state_dict_type(wrapped, kind):
        state = FullyShardedDataParallel.optim_state_dict(wrapped, optimizer)
    save_distributed(state, tmp_path) if sharded else torch.save(state, tmp_path / "optimizer.bin")
    ours = {plain_name(name): name for name in trainable(plain)}
    live = {
        ours[plain_name(name)]: optimizer.state[p] for name, p in wrapped.named_parameters() if p in optimizer.state
    }
    state_read = adam_state(read_optimizer(tmp_path), plain)
    assert set(state_read.m) == set(live)
    for name, entry in live.items():
        shape = trainable(plain)[name].shape
        assert torch.equal(state_read.m[name], entry["exp_avg"].view(shape))
        assert torch.equal(state_read.v[name], entry["exp_avg_sq"].view(shape))


def test_names_with_what_wrappers_add(fresh: Fresh) -> None:
    model = fresh()
    live = live_state(model, stepped(model))

    def named(change: Callable[[str], str]) -> SavedOptimizer:
        state: Any = {
            change(name): {"exp_avg": live.m[name], "exp_avg_sq": live.v[name], "step": torch.tensor(2.0)}
            for name in live.m
        }
        return SavedOptimizer("here", state, [{"params": list(state), "lr": 1, "betas": (0.9, 0.999), "eps": 1e-8}])

    for change in (
        lambda name: name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.mine."),
        lambda name: f"module.module.{name}",
        lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
        lambda name: f"_orig_mod.{name.removeprefix('base_model.model.')}",
    ):
        state = adam_state(named(change), model)
        assert all(state.m[name] is live.m[name] for name in live.m)
    with pytest.raises(TrajectoryError, match=r"28 parameters without a state, 28 that are not followed"):
        adam_state(named(lambda name: name.replace("lora", "lokr")), model)
    saved = named(str)
    first = next(iter(saved.state))
    twice = SavedOptimizer("here", {**saved.state, f"module.{first}": saved.state[first]}, saved.groups)
    with pytest.raises(TrajectoryError, match=r"several parameters go by the name '.*lora_A"):
        adam_state(twice, model)


def test_names_in_the_groups_win(fresh: Fresh) -> None:
    """An optimizer that was made of named parameters says which is which, in whatever order."""
    model = fresh()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad][::-1]
    optimizer = torch.optim.AdamW(named, lr=0.1)
    for number, (_, parameter) in enumerate(named):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    values = optimizer.state_dict()
    state = adam_state(SavedOptimizer("here", values["state"], values["param_groups"]), model)
    live = live_state(model, optimizer)
    assert all(torch.equal(state.m[name], live.m[name]) for name in live.m)


def test_settings_that_differ(fresh: Fresh) -> None:
    model = fresh()
    optimizer = stepped(model)
    optimizer.param_groups[1]["betas"] = (0.5, 0.9)
    with pytest.raises(TrajectoryError, match=r"betas is \(0\.9, 0\.999\), \(0\.5, 0\.9\) in its parameter groups"):
        live_state(model, optimizer)
    optimizer.param_groups[1]["betas"] = (0.9, 0.999)
    optimizer.state[next(iter(trainable(model).values()))]["step"] += 1
    with pytest.raises(TrajectoryError, match=r"the parameters made 2\.0, 3\.0 steps"):
        live_state(model, optimizer)
    del optimizer.state[next(iter(trainable(model).values()))]
    with pytest.raises(NoMomentsError, match=r"no exp_avg for 'base_model.*so it was never moved"):
        live_state(model, optimizer)
