"""`gradpursuit estimate`: what it measures, what it scales up, and that it leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gradpursuit.cli import main
from gradpursuit.config import load_config
from gradpursuit.estimate import SAMPLE, estimate
from jobs import Job


@pytest.fixture
def job(tiny_path: Path, tmp_path: Path) -> Job:
    return Job(tmp_path, tiny_path)


def test_printed_beside_training_on_everything(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(job.path)]) == 0
    out = capsys.readouterr().out
    for word in (
        "data",
        "trajectory",
        "gradients",
        "selection",
        "evaluation",
        "total",
        "fine-tuning on the whole pool",
    ):
        assert word in out
    assert not job.run_dir.exists()


def test_figures_are_of_this_data(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(job.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == {"pool": 31, "target": 6, "heldout": 6}
    assert found["gpu_memory"] is None
    assert found["memory"] > 100 << 20
    stages = found["stages"]
    # two preconditioners of the pool and two of the target, two checkpoints, 256 floats a row
    assert stages["gradients"]["disk"] == 2 * 2 * (31 + 6) * 256 * 4
    assert all(stages[name]["seconds"] > 0 for name in ("data", "trajectory", "gradients", "selection", "evaluation"))
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()))


def test_a_larger_pool_is_sampled_and_scaled_up(job: Job) -> None:
    rows = 3 * SAMPLE
    job.write("pool.jsonl", [job.row(i) for i in range(rows)])
    large = estimate(load_config(job.path))
    assert large.rows["pool"] == rows
    assert large.stages["gradients"].disk == 2 * 2 * (rows + 6) * 256 * 4
    job.write("pool.jsonl", [job.row(i) for i in range(rows // 6)])
    small = estimate(load_config(job.path))
    assert 3 < large.stages["gradients"].seconds / small.stages["gradients"].seconds < 12
    assert 3 < large.full_training / small.full_training < 12


def test_the_time_of_the_gradients_is_about_what_they_take(job: Job) -> None:
    """On a machine that does other things as well, so only the order is asserted; the docs give measured figures."""
    from gradpursuit.manifest import Manifest

    job.write("pool.jsonl", [job.row(i) for i in range(400)])
    found = estimate(load_config(job.path)).stages["gradients"].seconds
    assert main(["collect", str(job.path)]) == 2  # needs the stages before
    assert main(["warmup", str(job.path)]) == 0
    assert main(["collect", str(job.path)]) == 0
    taken = float(Manifest(job.run_dir).entry("gradients")["seconds"])
    assert taken / 4 < found < 4 * taken


def test_bad_input_is_told_as_the_run_would(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    (job.folder / "pool.jsonl").unlink()
    assert main(["estimate", str(job.path)]) == 2
    err = capsys.readouterr().err
    assert "pool.jsonl" in err
    assert "Traceback" not in err
    assert main(["estimate", str(job.folder / "nowhere.yaml")]) == 2


def test_too_few_steps_are_told_as_the_run_tells_them_before_any_work(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = ["--warmup.checkpoints", "500"]
    monkeypatch.delattr("gradpursuit.pipeline.Run.base")  # no model may be loaded
    messages = []
    for verb in ("estimate", "run"):
        assert main([verb, str(job.path), *setting]) == 2
        messages.append(capsys.readouterr().err.splitlines()[-1])
    assert messages[0] == messages[1]
    assert "warmup.checkpoints = 500, but 13 rows × 2 epochs at batch size 4 make only 8 steps" in messages[0]
