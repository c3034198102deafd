"""Checkpoints that somebody broke: one message each, and nothing hangs."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from breaking import broken_bytes, broken_tree, refusal
from gradpursuit.config import RunConfig
from gradpursuit.trajectory.imported import check_trajectory, import_trajectory
from gradpursuit.trajectory.model import trainable


@pytest.fixture
def theirs(tiny: Any, tmp_path: Path) -> Path:
    model = tiny.lora("llama", target_modules=["q_proj"])
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    state = {"global_step": 4, "log_history": [{"learning_rate": 0.1, "step": 2}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    moments = {
        i: {"exp_avg": torch.ones(p.shape), "exp_avg_sq": torch.ones(p.shape), "step": torch.tensor(4.0)}
        for i, p in enumerate(trainable(model).values())
    }
    group = {"params": list(moments), "betas": (0.9, 0.999), "eps": 1e-8, "lr": 0.1}
    torch.save({"state": moments, "param_groups": [group]}, folder / "optimizer.pt")
    return folder


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt"]
)
def test_broken_checkpoints(name: str, tiny: Any, theirs: Path, tmp_path: Path) -> None:
    model = tiny.lora("llama", target_modules=["q_proj"])
    config = RunConfig.model_validate(
        {"run_dir": str(tmp_path / "run"), "model": {"path": "m"}, "data": {"pool": "p", "target": "t"}}
        | {"warmup": {"trajectory": [str(theirs)]}}
    )
    path, refused = theirs / name, 0
    whole = path.read_bytes()

    def take() -> None:
        check_trajectory(config)
        import_trajectory(model, [str(theirs)], tmp_path / "ours", need_moments=True)

    for seed in range(80):
        made = random.Random(seed)
        if name.endswith(".json") and made.random() < 0.7:
            path.write_text(json.dumps(broken_tree(json.loads(whole), made)))
        else:
            path.write_bytes(broken_bytes(whole, made))
        refused += refusal(take, f"{name}, seed {seed}") is not None
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
    assert refused > 20
    assert not (tmp_path / "run").exists()
