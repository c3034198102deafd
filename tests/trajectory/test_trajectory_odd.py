"""Trajectories of strangers that are odd: one message each, and nothing is taken that cannot be true."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradpursuit.config import ModelSection
from gradpursuit.errors import ConfigError, TrajectoryError
from gradpursuit.trajectory.checkpoint import read_checkpoint
from gradpursuit.trajectory.imported import checkpoint_folders, import_trajectory
from gradpursuit.trajectory.model import Compute, trainable
from gradpursuit.trajectory.tuning import ADAPTER_CONFIG, adapter_settings


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny.lora("llama", target_modules=["q_proj"])


@pytest.fixture
def theirs(model: Any, tmp_path: Path) -> Path:
    """A checkpoint as a Trainer writes one, of the model's own weights."""
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    state = {"global_step": 4, "log_history": [{"learning_rate": 0.1, "step": 2}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    save_optimizer(folder, model)
    return folder


def save_optimizer(folder: Path, model: Any, change: Callable[[dict[str, Any]], Any] = lambda state: None) -> None:
    parameters = trainable(model)
    moments = {
        i: {"exp_avg": torch.ones(p.shape), "exp_avg_sq": torch.ones(p.shape), "step": torch.tensor(4.0)}
        for i, p in enumerate(parameters.values())
    }
    group = {"params": list(moments), "betas": (0.9, 0.999), "eps": 1e-8, "lr": 0.1}
    saved: dict[str, Any] = {"state": moments, "param_groups": [group]}
    change(saved)
    torch.save(saved, folder / "optimizer.pt")


def taken(model: Any, folder: Path) -> Any:
    return import_trajectory(model, [str(folder)], folder.parent / "ours", need_moments=True)


def test_the_plain_one_is_taken(model: Any, theirs: Path) -> None:
    (point,) = taken(model, theirs)
    assert (point.step, point.learning_rate, point.beta1, point.eps) == (4, 0.1, 0.9, 1e-8)


def _first(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["state"][0].update(values)


def _group(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["param_groups"][0].update(values)


def _moment(key: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["state"][0].update({key: change(saved["state"][0][key])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_group(betas=(1.0, 0.999)), "beta1 = 1, but"),
        (_group(betas=(-3.0, 0.999)), "beta1 = -3, but"),
        (_group(betas=(0.9, float("nan"))), "beta2 = nan, but"),
        (_group(betas=(0.9,)), "not two numbers"),
        (_group(betas=0.9), "not two numbers"),
        (_group(betas="ab"), "betas is ab"),
        (_group(betas=None), "betas is None"),
        (_group(eps=0.0), "eps = 0, but"),
        (_group(eps=-1.0), "eps = -1, but"),
        (_group(eps=float("inf")), "eps = inf, but"),
        (_group(eps=(1e-8, 1e-8)), "not two numbers"),
        (_group(params=3), "not as torch's"),
        (lambda saved: saved.update(param_groups=[3]), "not as torch's"),
        (lambda saved: saved.update(state={0: 3}), "not as torch's"),
        (lambda saved: saved["state"].update({(1, 2): {}}), "not as torch's"),
        (_moment("exp_avg", lambda m: m.to(torch.int8)), "of type torch.int8"),
        (_moment("exp_avg_sq", lambda v: v.to(torch.bool)), "of type torch.bool"),
        (_moment("exp_avg", lambda m: m.to_sparse()), "not stored"),
        (_moment("exp_avg", lambda m: m * float("nan")), "not finite"),
        (_moment("exp_avg_sq", lambda v: v / 0), "not finite"),
        (_moment("exp_avg_sq", lambda v: -v), "negative numbers"),
        (_moment("exp_avg_sq", lambda v: v[:1]), "has shape"),
        (_first(exp_avg=None), "no exp_avg for"),
        (_first(step="many"), "is no number"),
        (_first(step=torch.zeros(3)), "is no number"),
        (_first(step=5), "all must have made the same"),
        (lambda saved: [entry.update(step=float("inf")) for entry in saved["state"].values()], "cannot be"),
        (lambda saved: [entry.update(step=-4) for entry in saved["state"].values()], "cannot be"),
    ],
)
def test_optimizers_that_cannot_have_been(
    model: Any, theirs: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    save_optimizer(theirs, model, change)
    with pytest.raises(TrajectoryError, match=message):
        taken(model, theirs)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", '{"global_step": "4"}', '{"global_step": true}', '{"global_step": 4.5}',
        '{"global_step": -4}', '{"global_step": 1' + "0" * 400 + "}", '{"global_step": 1' + "0" * 5000 + "}",
        '{"global_step": 4, "log_history": {"a": 1}}', '{"global_step": 4, "log_history": 7}',
        '{"global_step": 4, "log_history": [{"learning_rate": "x", "step": 2}]}',
        '{"global_step": 4, "log_history": [{"learning_rate": null, "step": 2}]}',
        '{"global_step": 4, "log_history": [{"learning_rate": NaN, "step": 2}]}',
        '{"global_step": 4, "log_history": [{"learning_rate": -1, "step": 2}]}',
        '{"global_step": 4, "log_history": [{"learning_rate": 1e299, "step": 2}]}',
        '{"global_step": 4, "log_history": [{"learning_rate": Infinity, "step": 2}]}',
        '{"global_step": 4, "log_history": [{"learning_rate": 0, "step": 2}]}',
        '{"global_step": 4, "log_history": [{"learning_rate": 0.1, "step": []}]}',
        "[" * 200_000, '{"a":' * 200_000,
    ],
)  # fmt: skip
def test_states_of_a_trainer_that_are_none(model: Any, theirs: Path, text: str) -> None:
    (theirs / "trainer_state.json").write_text(text)
    with pytest.raises(TrajectoryError):
        taken(model, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 10**30}, {"r": 0}, {"r": -1}, {"r": "8"}, {"r": 2.5}, {"r": True}, {"r": None}, {"lora_alpha": "x"},
        {"lora_alpha": 0}, {"lora_alpha": 10**400}, {"rank_pattern": 3}, {"rank_pattern": {"q_proj": 10**30}},
        {"alpha_pattern": {"q_proj": None}}, {"target_modules": 7}, {"target_modules": [1, 2]},
        {"target_modules": {"a": 1}}, {"exclude_modules": [[]]}, {"init_lora_weights": []},
        {"init_lora_weights": {"a": 1}}, {"peft_type": "IA3"}, {"peft_type": []}, {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]}, {"bias": "all"}, {"target_parameters": ["x"]}, {"layers_pattern": ["x"]},
    ],
)  # fmt: skip
def test_settings_of_an_adapter_that_are_none(theirs: Path, settings: dict[str, Any]) -> None:
    path = theirs / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(TrajectoryError, match=f"{ADAPTER_CONFIG}: "):
        adapter_settings(theirs)


@pytest.mark.parametrize("change", [lambda w: w * float("nan"), lambda w: w.to(torch.int8), lambda w: "text"])
def test_weights_that_cannot_be_followed(model: Any, theirs: Path, change: Callable[[torch.Tensor], Any]) -> None:
    (theirs / "adapter_model.safetensors").unlink()
    weights = {name: change(value.detach()) for name, value in trainable(model).items()}
    torch.save(weights, theirs / "adapter_model.bin")
    with pytest.raises(TrajectoryError, match=r"adapter_model\.bin: '"):
        taken(model, theirs)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff" * 8,
        (1 << 60).to_bytes(8, "little") + b"{}",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x10\0\0\0\0\0\0\0{" + b"[" * 15,
    ],
)
def test_damaged_weights_are_one_message(model: Any, theirs: Path, payload: bytes) -> None:
    (theirs / "adapter_model.safetensors").write_bytes(payload)
    with pytest.raises(TrajectoryError, match="cannot be read"):
        taken(model, theirs)


@pytest.mark.parametrize(
    "change",
    [
        {"step": True}, {"step": 0}, {"step": -1}, {"step": 1e300}, {"learning_rate": "x"}, {"learning_rate": 0},
        {"learning_rate": float("nan")}, {"beta1": 1}, {"beta1": -3}, {"beta2": 2}, {"eps": 0}, {"eps": None},
    ],
)  # fmt: skip
def test_own_states_that_cannot_be(model: Any, theirs: Path, change: dict[str, Any]) -> None:
    (point,) = taken(model, theirs)
    path = point.folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TrajectoryError, match=r"state\.json"):
        read_checkpoint(point.folder)


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a\0b", "loop", "loop/inside", "file", "x" * 5000])
def test_places_that_are_no_folders(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrajectoryError, match=r"^warmup\.trajectory: "):
        checkpoint_folders([name if name.startswith("~") else str(tmp_path / name)])


def test_a_device_without_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.device 'meta': it holds no numbers"):
        Compute.of(ModelSection(path="m", device="meta"))
