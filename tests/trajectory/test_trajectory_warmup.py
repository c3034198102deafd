"""The warm-up leaves checkpoints that are the model and the optimizer of their step, the same for the same seed."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from gradpursuit.config import WarmupSection
from gradpursuit.data import Table
from gradpursuit.errors import ConfigError, RunError, TrajectoryError
from gradpursuit.trajectory.checkpoint import describe, read_trajectory, write_checkpoint
from gradpursuit.trajectory.loss import SupervisedLoss, collate
from gradpursuit.trajectory.model import Compute, trainable
from gradpursuit.trajectory.optimizer import AdamState, live_state
from gradpursuit.trajectory.training import TrainSpec, train
from gradpursuit.trajectory.warmup import warm_up

FLOAT32 = Compute(torch.device("cpu"), None)
WARMUP = WarmupSection(fraction=0.5, epochs=2, checkpoints=3, batch_size=2, learning_rate=1e-2)
Fresh = Callable[..., Any]


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def run(fresh: Fresh, small_table: Table, shared_run: Path) -> Path:
    """A finished warm-up of six steps, made once; tests only read it."""
    if not (shared_run / "slice.json").is_file():
        warm_up(fresh(), small_table, WARMUP, FLOAT32, shared_run, seed=3)
    return shared_run


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(run, tmp_path / "copy")


def test_checkpoints_are_the_model_and_optimizer_of_their_step(
    fresh: Fresh, small_table: Table, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same training again, watched step by step."""
    import gradpursuit.trajectory.callback as module

    seen: dict[str, Any] = {}
    of_the_step: dict[str, Any] = {}

    def live(model: Any, optimizer: Any) -> AdamState:
        of_the_step.update(
            {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in trainable(model).items()}
        )
        return live_state(model, optimizer)

    def watch(folder: Path, model: Any, adam: AdamState, rate: float) -> None:
        weights = {name: p.detach().clone() for name, p in trainable(model).items()}
        seen[folder.name] = (weights, {**of_the_step}, adam.step)
        write_checkpoint(folder, model, adam, rate)

    monkeypatch.setattr(module, "live_state", live)
    monkeypatch.setattr(module, "write_checkpoint", watch)
    model = fresh()
    checkpoints = warm_up(model, small_table, WARMUP, FLOAT32, tmp_path / "run", seed=3)
    assert [c.step for c in checkpoints] == [2, 4, 6]
    assert [c.folder.name for c in checkpoints] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for checkpoint in checkpoints:
        weights, moments, step = seen[checkpoint.folder.name]
        other = fresh(seed=9)
        checkpoint.load_adapter(other)
        adam = checkpoint.adam(other)
        assert (adam.step, adam.beta1, adam.beta2, adam.eps) == (checkpoint.step, 0.9, 0.999, 1e-8)
        assert adam.step == step
        assert set(adam.m) == set(adam.v) == set(trainable(other)) == set(weights)
        for name, parameter in trainable(other).items():
            assert torch.equal(parameter, weights[name])
            assert torch.equal(adam.m[name], moments[name]["exp_avg"])
            assert torch.equal(adam.v[name], moments[name]["exp_avg_sq"])
            assert adam.m[name].shape == parameter.shape
            assert int(moments[name]["step"]) == adam.step
    last, _, _ = seen["checkpoint-3"]
    assert all(torch.equal(p, last[name]) for name, p in trainable(model).items())
    first, _, _ = seen["checkpoint-1"]
    assert any(not torch.equal(first[name], last[name]) for name in last)


def test_same_seed_same_bytes_other_seed_others(fresh: Fresh, small_table: Table, run: Path, tmp_path: Path) -> None:
    warm_up(fresh(), small_table, WARMUP, FLOAT32, tmp_path / "same", seed=3)
    files = sorted(path.relative_to(run) for path in run.rglob("*") if path.is_file())
    assert len(files) == 3 * 4 + 1
    for file in files:
        assert (run / file).read_bytes() == (tmp_path / "same" / file).read_bytes(), file
    warm_up(fresh(), small_table, WARMUP, FLOAT32, tmp_path / "other", seed=4)
    name = "checkpoint-1/adapter_model.safetensors"
    assert (run / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_learning_rates_are_positive_and_decrease(run: Path) -> None:
    rates = [checkpoint.learning_rate for checkpoint in read_trajectory(run)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 3
    assert 0 < rates[-1] < rates[0] <= WARMUP.learning_rate


def test_every_step_has_a_learning_rate(fresh: Fresh, small_table: Table, tmp_path: Path) -> None:
    """As many checkpoints as steps: none of them weighs nothing, and the first has moved."""
    warmup = WarmupSection(fraction=0.5, epochs=1, checkpoints=3, batch_size=2, learning_rate=1e-2)
    model = fresh()
    start = {name: p.detach().clone() for name, p in trainable(model).items()}
    checkpoints = warm_up(model, small_table, warmup, FLOAT32, tmp_path, seed=0)
    assert [c.step for c in checkpoints] == [1, 2, 3]
    rates = [c.learning_rate for c in checkpoints]
    assert rates == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    checkpoints[0].load_adapter(model)
    assert any(not torch.equal(p, start[name]) for name, p in trainable(model).items())


def test_the_schedule_rises_then_falls_and_is_never_zero(fresh: Fresh, small_table: Table) -> None:
    rates: list[float] = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    spec = TrainSpec(70, 1, 1.0e-3, 0, "test")
    train(fresh(), small_table[:2], spec, FLOAT32, callbacks=[Watch()])
    assert len(rates) == 70
    assert rates[:2] == pytest.approx([0.5e-3, 1e-3])
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[1:]))
    assert 0 < rates[-1] < 0.02e-3


def test_the_slice_is_written(run: Path, small_table: Table) -> None:
    value = json.loads((run / "slice.json").read_text())
    assert value["steps"] == 6
    assert len(value["ids"]) == len(set(value["ids"])) == 6
    assert set(value["ids"]) <= set(small_table.ids)


def test_peft_reads_the_checkpoint(run: Path, tiny_path: Path, fresh: Fresh, small_table: Table) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours = fresh(seed=7)
    read_trajectory(run)[-1].load_adapter(ours)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path), run / "checkpoint-3")
    ids = torch.tensor([small_table[0].input_ids])
    with torch.no_grad():
        assert torch.allclose(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)
    config = json.loads((run / "checkpoint-3" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(config["target_modules"]) == 14


def test_training_lowers_the_loss_and_weights_matter(fresh: Fresh, small_table: Table) -> None:
    rows = list(small_table)[:4]

    def after(weights: list[float] | None) -> list[float]:
        model = fresh()
        spec = TrainSpec.for_epochs(4, 6, 2, 2e-2, 0, "test")
        assert spec.steps == 12
        mean = train(model, rows, spec, FLOAT32, weights=weights)
        assert mean > 0
        assert not model.training
        with torch.no_grad():
            return SupervisedLoss(model, FLOAT32)(collate(rows, 2))[0].tolist()  # type: ignore[no-any-return]

    with torch.no_grad():
        before = SupervisedLoss(fresh(), FLOAT32)(collate(rows, 2))[0].tolist()
    plain, ones, chosen = after(None), after([1.0] * 4), after([4.0, 0.0, 0.0, 0.0])
    assert sum(plain) < sum(before)
    assert plain == ones
    assert chosen != plain
    with pytest.raises(ValueError, match="zip"):
        after([1.0])


@pytest.mark.parametrize("seed", [0, 1])
def test_training_data_order_comes_from_the_seed(fresh: Fresh, small_table: Table, seed: int) -> None:
    def result(seed: int) -> torch.Tensor:
        model = fresh()
        train(model, list(small_table)[:6], TrainSpec(2, 2, 1e-2, seed, "test"), FLOAT32)
        return torch.cat([p.detach().flatten() for p in trainable(model).values()])

    assert torch.equal(result(seed), result(seed))
    assert not torch.equal(result(seed), result(seed + 1))


def test_too_few_steps(fresh: Fresh, small_table: Table, tmp_path: Path) -> None:
    config = WarmupSection(fraction=0.1, epochs=1, checkpoints=3, batch_size=8)
    message = r"warmup\.checkpoints = 3, but 2 rows × 1 epochs at batch size 8 make only 1 steps; raise warmup\."
    with pytest.raises(ConfigError, match=message):
        warm_up(fresh(), small_table, config, FLOAT32, tmp_path, seed=0)


def test_earlier_checkpoints_do_not_stay(fresh: Fresh, small_table: Table, copy: Path) -> None:
    config = WarmupSection(fraction=0.5, epochs=1, checkpoints=1, batch_size=8)
    assert [c.step for c in warm_up(fresh(), small_table, config, FLOAT32, copy, seed=0)] == [1]
    assert len(read_trajectory(copy)) == 1


def test_disk_that_is_too_small(
    fresh: Fresh, small_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="the trajectory needs"):
        warm_up(fresh(), small_table, WARMUP, FLOAT32, tmp_path, seed=0)


def test_another_rank_is_refused_with_both_shapes(fresh: Fresh, run: Path) -> None:
    model = fresh(r=2)
    checkpoint = read_trajectory(run)[0]
    for load in (checkpoint.load_adapter, checkpoint.adam):
        with pytest.raises(TrajectoryError, match=r"has shape \(4, 32\), in the model \(2, 32\); model\.lora"):
            load(model)


def test_other_modules_are_refused_with_counts(fresh: Fresh, run: Path) -> None:
    model = fresh(target_modules=["q_proj"])
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    with pytest.raises(
        TrajectoryError, match=r"0 parameters missing, 24 unknown \(first: 'base_model.*not in the model"
    ):
        read_trajectory(run)[0].load_adapter(model)
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "moments.safetensors"])
def test_missing_or_broken_files(fresh: Fresh, copy: Path, name: str) -> None:
    model = fresh()
    checkpoint = read_trajectory(copy)[1]
    path = checkpoint.folder / name
    whole = path.read_bytes()
    load = checkpoint.adam if name.startswith("moments") else checkpoint.load_adapter
    for content in (b"", whole[:200], whole[:-10], b"\xff" * 50, b"not a tensor file"):
        path.write_bytes(content)
        with pytest.raises(TrajectoryError, match=r"cannot be read: .*; run the warm-up again"):
            load(model)
    path.unlink()
    with pytest.raises(TrajectoryError, match="not there; run the warm-up again"):
        load(model)


def test_a_moment_that_is_missing(fresh: Fresh, copy: Path) -> None:
    from safetensors.torch import save_file

    checkpoint = read_trajectory(copy)[0]
    path = checkpoint.folder / "moments.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("v."))
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(TrajectoryError, match=rf"1 parameters missing.*'{name[2:]}' is missing"):
        checkpoint.adam(fresh())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{}", "step, learning_rate, beta1, beta2, eps missing"),
        ("[]", "step, learning_rate"),
        ("{", "damaged, it is not the JSON that was written"),
        ('{"step": 1, "learning_rate": "x", "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}', "learning_rate missing or no"),
        (None, "not there"),
    ],
)
def test_state_that_cannot_be_used(copy: Path, text: str | None, named: str) -> None:
    path = copy / "checkpoint-2" / "state.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(TrajectoryError, match=rf"checkpoint-2/state\.json: .*{named}"):
        read_trajectory(copy)


def test_no_trajectory(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="no checkpoint-1; run the warm-up first"):
        read_trajectory(tmp_path)


def test_describe(run: Path) -> None:
    value = describe(read_trajectory(run)[0])
    assert json.loads(json.dumps(value)) == value
    assert set(value) == {"step", "learning_rate", "beta1", "beta2", "eps"}


def stepped(model: Any) -> AdamState:
    """The moments after one step."""
    optimizer = torch.optim.AdamW(list(trainable(model).values()), lr=0.1)
    for parameter in trainable(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return live_state(model, optimizer)


def test_checkpoint_is_replaced_whole_or_not_at_all(fresh: Fresh, tmp_path: Path) -> None:
    model = fresh()
    folder = tmp_path / "checkpoint-1"
    adam = stepped(model)
    for step in (1, 2):
        write_checkpoint(folder, model, replace(adam, step=step), 0.1)
        assert read_trajectory(tmp_path)[0].step == step
        assert not (folder / "left over").exists()
        (folder / "left over").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_folder_that_cannot_be_written(fresh: Fresh, tmp_path: Path) -> None:
    model = fresh()
    (tmp_path / "f").write_text("x")
    with pytest.raises(RunError, match="cannot be written"):
        write_checkpoint(tmp_path / "f" / "checkpoint-1", model, stepped(model), 0.1)
