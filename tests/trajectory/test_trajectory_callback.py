"""The callback in runs of the real Trainer and of TRL: what it leaves is the model and the optimizer of the step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import PrinterCallback, TrainerCallback

import gradpursuit
from foreign import Watch, arguments, assert_same_moments, run_trainer
from gradpursuit.config import LoraSection, ModelSection
from gradpursuit.data import Table
from gradpursuit.errors import ConfigError, ModelError, TrajectoryError
from gradpursuit.trajectory import GradientTrajectoryCallback
from gradpursuit.trajectory.checkpoint import read_trajectory
from gradpursuit.trajectory.imported import import_trajectory
from gradpursuit.trajectory.model import attach_lora, load_model, load_tokenizer, trainable
from gradpursuit.trajectory.tuning import tuned

Fresh = Callable[..., Any]


class Stop(TrainerCallback):
    """Ends training after a step, as a killed process does for what follows."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


def check(folder: Path, watch: Watch, steps: list[int], model: Any) -> None:
    """The trajectory in `folder` is what was watched."""
    checkpoints = read_trajectory(folder)
    assert [c.step for c in checkpoints] == steps
    before = 0
    for checkpoint in checkpoints:
        step = checkpoint.step
        checkpoint.load_adapter(model)
        assert set(trainable(model)) == set(watch.weights[step])
        assert all(torch.equal(p, watch.weights[step][name]) for name, p in trainable(model).items())
        assert_same_moments(checkpoint.adam(model), watch.moments[step])
        rates = [watch.rates[s] for s in range(before + 1, step + 1)]
        assert checkpoint.learning_rate == pytest.approx(np.mean(rates), rel=1e-12)
        before = step


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_is_public() -> None:
    assert gradpursuit.GradientTrajectoryCallback is GradientTrajectoryCallback


def test_a_run_of_the_trainer(fresh: Fresh, tmp_path: Path) -> None:
    """Accumulated gradients, a learning rate that changes, and the Trainer's own checkpoints beside."""
    own, ours = tmp_path / "out", tmp_path / "trajectory"
    watch = run_trainer(fresh(), own, [GradientTrajectoryCallback(ours, 3)], gradient_accumulation_steps=2)
    assert len(set(watch.rates.values())) > 3
    check(ours, watch, [2, 4, 6], fresh(seed=9))
    assert (ours / "checkpoint-1" / "adapter_config.json").is_file()
    again, model = tmp_path / "again", fresh(seed=9)
    import_trajectory(model, [str(own)], again, need_moments=True)
    direct = tmp_path / "direct"
    import_trajectory(model, [str(ours)], direct, need_moments=True)
    for name in ("adapter_model.safetensors", "moments.safetensors"):
        for number in (1, 2, 3):
            file = f"checkpoint-{number}/{name}"
            assert (ours / file).read_bytes() == (again / file).read_bytes() == (direct / file).read_bytes()
    for left, right in zip(read_trajectory(ours), read_trajectory(again), strict=True):
        assert left.learning_rate == pytest.approx(right.learning_rate, rel=1e-12)
        assert (left.step, left.beta1, left.beta2, left.eps) == (right.step, right.beta1, right.beta2, right.eps)


def test_a_run_of_trl(tiny_config: ModelSection, small_table: Table, tmp_path: Path) -> None:
    """TRL puts the adapter on the model itself; its own checkpoints give the same trajectory."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    messages = [
        {"messages": [{"role": "user", "content": row.id}, {"role": "assistant", "content": f"It is {row.id}."}]}
        for row in small_table
    ]
    watch, own, ours = Watch(), tmp_path / "out", tmp_path / "trajectory"
    adapter = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], lora_dropout=0.05, use_rslora=True)
    trainer = SFTTrainer(
        load_model(tiny_config),
        args=SFTConfig(**arguments(own, bf16=False, gradient_checkpointing=False)),
        train_dataset=Dataset.from_list(messages),
        processing_class=load_tokenizer(tiny_config),
        peft_config=adapter,
        callbacks=[GradientTrajectoryCallback(ours, 3), watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    base, section = load_model(tiny_config), ModelSection(path="x")
    with tuned(base, section, 0, ours / "checkpoint-1") as model:
        assert model.peft_config["default"].use_rslora
        check(ours, watch, [2, 4, 6], model)
    with tuned(base, section, 0, own / "checkpoint-2") as model:
        found = import_trajectory(model, [str(own)], tmp_path / "again", need_moments=True)
    for left, right in zip(read_trajectory(ours), found, strict=True):
        assert left.learning_rate == pytest.approx(right.learning_rate, rel=1e-12)
        for name in ("adapter_model.safetensors", "moments.safetensors"):
            assert (left.folder / name).read_bytes() == (right.folder / name).read_bytes()


def test_layers_of_the_model_itself(tiny_config: ModelSection, tmp_path: Path) -> None:
    base, section = load_model(tiny_config), ModelSection(path="x", layers=r".*mlp\.(up|down)_proj")
    own, ours = tmp_path / "out", tmp_path / "trajectory"
    with tuned(base, section, 0) as model:
        watch = run_trainer(model, own, [GradientTrajectoryCallback(ours, 3)])
    with tuned(base, section, 0) as model:
        check(ours, watch, [2, 4, 6], model)
        assert not (ours / "checkpoint-1" / "adapter_config.json").exists()
        assert (ours / "checkpoint-1" / "weights.safetensors").is_file()
        import_trajectory(model, [str(own)], tmp_path / "again", need_moments=True)
    for name in ("weights.safetensors", "moments.safetensors"):
        for number in (1, 2, 3):
            file = f"checkpoint-{number}/{name}"
            assert (ours / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.fixture(scope="module")
def whole(tiny_config: ModelSection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trajectory of two checkpoints out of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    model = attach_lora(load_model(tiny_config), LoraSection(r=4, alpha=8), 0)
    run_trainer(model, folder / "out", [GradientTrajectoryCallback(folder / "trajectory", 2)], save_strategy="no")
    return folder / "trajectory"


@pytest.mark.parametrize(("stop", "restore"), [(3, False), (5, True)])
def test_a_run_that_is_resumed(
    fresh: Fresh, whole: Path, tmp_path: Path, stop: int, restore: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed at a step, gone on with from the Trainer's checkpoint: the same files as without."""
    ours, own = tmp_path / "trajectory", tmp_path / "own"
    with caplog.at_level(logging.WARNING, "gradpursuit"):
        run_trainer(fresh(), own, [GradientTrajectoryCallback(ours, 2), Stop(stop)], save_steps=1)
    assert "1 of 2 checkpoints were not written" in caplog.text
    first = (ours / "checkpoint-1" / "state.json").stat().st_mtime_ns
    settings = {"resume": str(own / f"checkpoint-{stop - 1}"), "restore_callback_states_from_checkpoint": restore}
    run_trainer(fresh(seed=7), own, [GradientTrajectoryCallback(ours, 2)], save_steps=1, **settings)
    assert files(ours) == files(whole)
    assert (stop == 3) == ((ours / "checkpoint-1" / "state.json").stat().st_mtime_ns > first)


def test_resumes_that_cannot_be_followed(fresh: Fresh, tmp_path: Path) -> None:
    ours, own = tmp_path / "trajectory", tmp_path / "own"
    run_trainer(fresh(), own, [GradientTrajectoryCallback(ours, 3)])
    resumed = str(own / "checkpoint-4")
    with pytest.raises(TrajectoryError, match=r"with checkpoints at steps \[2, 4, 6\]; .*\[3, 6\] are wanted"):
        run_trainer(fresh(), own, [GradientTrajectoryCallback(ours, 2)], resume=resumed)
    with pytest.raises(TrajectoryError, match="checkpoint-1 is not there, though the run goes on at step 4"):
        run_trainer(fresh(), own, [GradientTrajectoryCallback(tmp_path / "other", 3)], resume=resumed)
    run_trainer(fresh(), tmp_path / "without")
    with pytest.raises(TrajectoryError, match="was trained up to there without this callback"):
        run_trainer(
            fresh(), own, [GradientTrajectoryCallback(ours, 3)], resume=str(tmp_path / "without" / "checkpoint-4")
        )


@pytest.mark.parametrize(
    ("optim", "found"), [("sgd", "SGD.*no Adam moments"), ("adafactor", "Adafactor.*factored second moments")]
)
def test_optimizers_are_refused_at_the_first_step(fresh: Fresh, tmp_path: Path, optim: str, found: str) -> None:
    watch = Watch()
    with pytest.raises(TrajectoryError, match=found):
        run_trainer(fresh(), tmp_path / "out", [watch, GradientTrajectoryCallback(tmp_path / "t", 1)], optim=optim)
    assert max(watch.weights) == 1
    assert not (tmp_path / "t").exists()


def test_what_is_refused_before_the_first_step(fresh: Fresh, tiny_config: ModelSection, tmp_path: Path) -> None:
    def run(model: Any, folder: Path, count: int = 3, **settings: Any) -> None:
        run_trainer(model, tmp_path / "out", [GradientTrajectoryCallback(folder, count)], **settings)

    with pytest.raises(ModelError, match="trainable parameters cannot be followed"):
        run(load_model(tiny_config).requires_grad_(True), tmp_path / "t")
    with pytest.raises(ConfigError, match=r"is the Trainer's own, .*; give a folder of its own"):
        run(fresh(), tmp_path / "out")
    with pytest.raises(ConfigError, match="checkpoints = 7, but the run has only 6 steps"):
        run(fresh(), tmp_path / "t", 7)
    with pytest.raises(ConfigError, match="checkpoints = 0; at least one"):
        GradientTrajectoryCallback(tmp_path / "t", 0)
    (tmp_path / "used" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(ConfigError, match="already holds checkpoints; move them away or give another folder"):
        run(fresh(), tmp_path / "used")
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_only_the_main_process_writes_and_wrappers_are_undone(fresh: Fresh, tmp_path: Path) -> None:
    """The events of a run as a second process sees them, and with the model in its wrapper."""
    from types import SimpleNamespace

    from accelerate import Accelerator

    model = fresh()
    optimizer = Accelerator(cpu=True).prepare_optimizer(
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    )
    ids = torch.arange(3, 9)[None]
    args = SimpleNamespace(output_dir=str(tmp_path / "out"))
    for main in (False, True):
        state = SimpleNamespace(global_step=0, max_steps=1, is_world_process_zero=main, stateful_callbacks={})
        callback = GradientTrajectoryCallback(tmp_path / "t", 1)
        callback.on_train_begin(args, state, None, model=nn.DataParallel(model))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        callback.on_optimizer_step(args, state, None, optimizer=optimizer)
        state.global_step = 1
        callback.on_step_end(args, state, None, model=nn.DataParallel(model), optimizer=optimizer)
        assert (tmp_path / "t" / "checkpoint-1").exists() == main
    read_trajectory(tmp_path / "t")[0].load_adapter(fresh(seed=3))
