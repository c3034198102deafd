"""A run on checkpoints that exist already: the same trajectory, noticed when it changes, refused when it cannot be."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from foreign import Watch, run_trainer
from gradpursuit.cli import main
from gradpursuit.config import ModelSection, RunConfig, load_config
from gradpursuit.errors import ConfigError, TrajectoryError
from gradpursuit.manifest import Manifest
from gradpursuit.trajectory.checkpoint import read_trajectory
from gradpursuit.trajectory.imported import check_trajectory, checkpoint_folders, import_trajectory, trajectory_hashes
from gradpursuit.trajectory.model import load_model
from gradpursuit.trajectory.optimizer_files import NoMomentsError
from gradpursuit.trajectory.tuning import tuned
from jobs import Job

STEPS = (2, 4, 6)


def adapted(config: ModelSection) -> Any:
    torch.manual_seed(0)
    return get_peft_model(load_model(config), LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))


@pytest.fixture(scope="module")
def made(tiny_config: ModelSection, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch]:
    """The folder of a Trainer's run with its three checkpoints."""
    folder = tmp_path_factory.mktemp("theirs")
    return folder, run_trainer(adapted(tiny_config), folder)


@pytest.fixture
def theirs(made: tuple[Path, Watch], tmp_path: Path) -> Path:
    """A copy to be changed."""
    return shutil.copytree(made[0], tmp_path / "theirs")


def imported(config: ModelSection, paths: list[Path], folder: Path, need: bool = True) -> Any:
    names = [str(path) for path in paths]
    with tuned(load_model(config), config, 0, checkpoint_folders(names)[0]) as model:
        return import_trajectory(model, names, folder, need_moments=need)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def job_of(job: Job, theirs: Path, **sections: Any) -> Job:
    job.tree["warmup"] = {}
    job.save(**{"warmup": {"trajectory": str(theirs)}, **sections})
    return job


def run_config(theirs: Path, run_dir: Path, **model: Any) -> RunConfig:
    data = {"pool": ["p"], "target": ["t"]}
    tree = {
        "run_dir": str(run_dir),
        "model": {"path": "m", **model},
        "data": data,
        "warmup": {"trajectory": str(theirs)},
    }
    return RunConfig.model_validate(tree)


def test_folders_by_number_or_as_listed(theirs: Path, tmp_path: Path) -> None:
    (theirs / "checkpoint-4").rename(theirs / "checkpoint-10")
    (theirs / "checkpoint-best").mkdir()
    (theirs / "adapter_config.json").write_text("{}")  # as trainer.save_model() leaves it beside
    numbers = [path.name for path in checkpoint_folders([str(theirs)])]
    assert numbers == ["checkpoint-2", "checkpoint-6", "checkpoint-10"]
    listed = [str(theirs / name) for name in reversed(numbers)]
    assert [str(path) for path in checkpoint_folders(listed)] == listed
    assert [path.name for path in checkpoint_folders([str(theirs / "checkpoint-2")])] == ["checkpoint-2"]
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "no checkpoint: neither")):
        with pytest.raises(TrajectoryError, match=rf"warmup\.trajectory: {folder}: {message}"):
            checkpoint_folders([str(folder)])


def test_a_whole_run_on_given_checkpoints(
    made: tuple[Path, Watch], theirs: Path, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is trained; a changed checkpoint is noticed; what the run keeps is its own."""
    _, watch = made
    job_of(job, theirs, selection={"strategies": ["gtp"]}, evaluation={"seeds": 1})
    assert main(["run", str(job.path)]) == 0
    assert load_config(job.run_dir / "config.yaml").warmup.trajectory == [str(theirs)]
    found = read_trajectory(job.run_dir / "trajectory")
    assert [c.step for c in found] == list(STEPS)
    for checkpoint in found:
        weights = load_file(checkpoint.folder / "adapter_model.safetensors")
        moments = load_file(checkpoint.folder / "moments.safetensors")
        for name, value in watch.weights[checkpoint.step].items():
            assert torch.equal(weights[name], value)
            assert torch.equal(moments[f"v.{name}"], watch.moments[checkpoint.step][name]["exp_avg_sq"])
        assert checkpoint.learning_rate == pytest.approx(
            sum(watch.rates[s] for s in (checkpoint.step - 1, checkpoint.step)) / 2, rel=1e-9
        )
        settings = json.loads((checkpoint.folder / "adapter_config.json").read_text())
        assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (3, 5, ["q_proj", "up_proj"])
    state = Manifest(job.run_dir).read()["stages"]
    assert main(["run", str(job.run_dir / "config.yaml")]) == 0
    assert Manifest(job.run_dir).read()["stages"] == state
    optimizer = theirs / "checkpoint-4" / "optimizer.pt"
    values = torch.load(optimizer, weights_only=True)
    values["state"][0]["exp_avg_sq"] *= 2
    torch.save(values, optimizer)
    with caplog.at_level(logging.WARNING, "gradpursuit"):
        assert main(["warmup", str(job.run_dir)]) == 0
    assert Manifest(job.run_dir).read()["stages"]["trajectory"]["fingerprint"] != state["trajectory"]["fingerprint"]
    assert not torch.equal(
        load_file(job.run_dir / "trajectory" / "checkpoint-2" / "moments.safetensors")[
            f"v.{next(iter(watch.weights[4]))}"
        ],
        watch.moments[4][next(iter(watch.weights[4]))]["exp_avg_sq"],
    )


def test_a_trajectory_that_was_imported_is_needed_no_more(
    theirs: Path, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job_of(job, theirs, selection={"strategies": ["gtp"]}, evaluation={"seeds": 1})
    assert main(["warmup", str(job.path)]) == 0
    assert main(["collect", str(job.path)]) == 0
    theirs.rename(away := theirs.with_name("away"))
    note = f"not there any more: {theirs}; what was made of it is used"
    for verb in (["run", str(job.path)], ["verify", str(job.run_dir), "--sample", "2"]):
        capsys.readouterr()
        assert main(verb) == 0
        assert capsys.readouterr().err.count(f"note: {note}") == 1
    assert main(["status", str(job.run_dir)]) == 0
    printed = capsys.readouterr().out
    assert f"trajectory: {note}" in printed
    assert printed.count("complete") == 7
    before = [path.read_bytes() for path in sorted((job.run_dir / "trajectory").rglob("*")) if path.is_file()]
    assert main(["warmup", str(job.run_dir), "--seed", "5"]) == 2
    assert f"warmup.trajectory: {theirs}: no such folder" in capsys.readouterr().err
    assert [path.read_bytes() for path in sorted((job.run_dir / "trajectory").rglob("*")) if path.is_file()] == before
    assert main(["warmup", str(job.run_dir), "--warmup.trajectory", str(away), "--seed", "5"]) == 0


def test_hashes_are_of_what_is_read(theirs: Path) -> None:
    before = trajectory_hashes([str(theirs)])
    assert {name.split("/")[0] for name in before} == {"1", "2", "3"}
    assert {"1/optimizer.pt", "1/trainer_state.json", "1/adapter_model.safetensors"} < set(before)
    (theirs / "checkpoint-2" / "rng_state.pth").write_bytes(b"other")
    assert trajectory_hashes([str(theirs)]) == before
    edit(theirs / "checkpoint-2" / "trainer_state.json", global_step=1)
    assert trajectory_hashes([str(theirs)]) != before


def test_layers_of_the_model_itself(tiny_config: ModelSection, job: Job, tmp_path: Path) -> None:
    config = tiny_config.model_copy(update={"layers": r".*mlp\.down_proj", "lora": None})
    with tuned(load_model(config), config, 0) as model:
        watch = run_trainer(model, tmp_path / "theirs")
    job_of(job, tmp_path / "theirs", model={"layers": config.layers})
    assert main(["warmup", str(job.path)]) == 0
    found = load_file(job.run_dir / "trajectory" / "checkpoint-2" / "weights.safetensors")
    assert set(found) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert all(torch.equal(found[name], value) for name, value in watch.weights[4].items())
    path = tmp_path / "theirs" / "checkpoint-6" / "model.safetensors"
    values = load_file(path)
    values["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(values, path, {"format": "pt"})
    with (
        tuned(load_model(config), config, 0) as model,
        pytest.raises(TrajectoryError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' is not as in model\.path"),
    ):
        import_trajectory(model, [str(tmp_path / "theirs")], tmp_path / "ours", need_moments=True)
    (tmp_path / "theirs" / "checkpoint-2" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"checkpoint-2 holds an adapter, but model\.layers is set"):
        check_trajectory(run_config(tmp_path / "theirs", tmp_path, layers="x"))


def test_a_warm_up_trains_layers(job: Job) -> None:
    job.save(model={"layers": r".*self_attn\.o_proj"})
    assert main(["warmup", str(job.path)]) == 0
    first, last = (load_file(job.run_dir / "trajectory" / f"checkpoint-{t}" / "weights.safetensors") for t in (1, 2))
    assert set(first) == {f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1)}
    assert all(not torch.equal(first[name], last[name]) for name in first)


def test_rates_that_were_not_logged(tiny_config: ModelSection, theirs: Path, tmp_path: Path, caplog: Any) -> None:
    """The optimizer's rates at both ends stand in, and it is said; the last one alone would be nought."""
    logged = [c.learning_rate for c in imported(tiny_config, [theirs], tmp_path / "logged")]
    for step in STEPS:
        edit(theirs / f"checkpoint-{step}" / "trainer_state.json", log_history=[{"step": step, "loss": 1.0}])
    with caplog.at_level(logging.WARNING, "gradpursuit"):
        rates = [c.learning_rate for c in imported(tiny_config, [theirs], tmp_path / "ours")]
    assert len([r for r in caplog.records if "no learning rate was logged" in r.message]) == 3
    # two steps of warm-up to 1e-2, four down to 0; the optimizer holds 1e-2, 0.5e-2 and 0 when saved
    assert rates == pytest.approx([1e-2, 0.75e-2, 0.25e-2])
    assert logged == pytest.approx([0.25e-2, 0.875e-2, 0.375e-2])


def test_rates_that_are_nought_or_unknown(tiny_config: ModelSection, theirs: Path, tmp_path: Path) -> None:
    state = theirs / "checkpoint-2" / "trainer_state.json"
    edit(state, log_history=[{"step": 1, "learning_rate": 0.0}])
    with pytest.raises(TrajectoryError, match=r"learning rate up to there is 0\.0, .*leave it out"):
        imported(tiny_config, [theirs], tmp_path / "ours")
    edit(state, log_history=[])
    (theirs / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(TrajectoryError, match="the learning rate is known neither from"):
        imported(tiny_config, [theirs], tmp_path / "ours", need=False)
    state.write_text("[]")
    with pytest.raises(TrajectoryError, match="not the state of a Trainer"):
        imported(tiny_config, [theirs], tmp_path / "ours")


def test_wrong_order_missing_weights_and_other_adapters(
    tiny_config: ModelSection, theirs: Path, tmp_path: Path
) -> None:
    paths = [theirs / "checkpoint-4", theirs / "checkpoint-2"]
    with pytest.raises(TrajectoryError, match=r"after 2 steps, the one before it after 4; list the checkpoints oldest"):
        imported(tiny_config, paths, tmp_path / "ours")
    edit(theirs / "checkpoint-4" / "adapter_config.json", lora_alpha=6)
    with pytest.raises(
        TrajectoryError, match=r"lora_alpha = 6, but 5 in .*checkpoint-2; a trajectory is of one adapter"
    ):
        check_trajectory(run_config(theirs, tmp_path))
    with pytest.raises(ConfigError, match=r"is the run's own; copy it elsewhere"):
        check_trajectory(run_config(shutil.copytree(theirs, tmp_path / "run" / "trajectory"), tmp_path / "run"))
    weights = theirs / "checkpoint-2" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(TrajectoryError, match=r"adapter_model\.safetensors: cannot be read"):
        imported(tiny_config, [theirs / "checkpoint-2"], tmp_path / "ours")
    weights.unlink()
    assert len(imported(tiny_config, [theirs / "checkpoint-2"], tmp_path / "ours")) == 1
    weights.with_suffix(".bin").unlink()
    with pytest.raises(TrajectoryError, match="no weights there"):
        imported(tiny_config, [theirs / "checkpoint-2"], tmp_path / "ours")


def test_an_adapter_that_cannot_be_followed_is_refused_before_any_work(
    theirs: Path, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(theirs / "checkpoint-2" / "adapter_config.json", use_dora=True)
    job_of(job, theirs)
    assert main(["run", str(job.path)]) == 2
    assert "use_dora = True cannot be followed; train a plain LoRA adapter" in capsys.readouterr().err
    assert not job.run_dir.exists()


def test_without_moments_there_is_the_plain_gradient(
    tiny_config: ModelSection, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SGD's checkpoints serve with preconditioner: identity, and say why not where moments are asked for."""
    theirs = tmp_path / "theirs"
    run_trainer(adapted(tiny_config), theirs, optim="sgd", learning_rate=1.0)
    job_of(job, theirs, selection={"strategies": ["gtp", "random"]}, evaluation={"seeds": 1})
    assert main(["warmup", str(job.path)]) == 2
    assert "no Adam moments: the optimizer keeps" in capsys.readouterr().err
    identity = ["--gradients.preconditioner", "identity"]
    assert main(["warmup", str(job.path), *identity]) == 0
    assert main(["collect", str(job.path), *identity]) == 0
    assert (job.run_dir / "gradients" / "pool" / "identity" / "manifest.json").is_file()
    found = read_trajectory(job.run_dir / "trajectory")
    assert [c.step for c in found] == list(STEPS)
    assert not list(job.run_dir.rglob("moments.safetensors"))
    capsys.readouterr()
    before = {path: path.read_bytes() for path in job.run_dir.rglob("*.*") if path.name != "log.txt"}
    for setting in ([], [*identity, "--selection.strategies", "gtp,less"]):
        assert main(["collect", str(job.path), *setting]) == 2
        message = capsys.readouterr().err
        assert f"selection.strategies: {'less' if setting else 'gtp'} by Adam's moments, which the traj" in message
        assert f"{theirs / 'checkpoint-2' / 'optimizer.pt'}: no Adam moments: the optimizer keeps" in message
    assert {path: path.read_bytes() for path in before} == before, "what was collected is kept, and still complete"
    assert main(["collect", str(job.path), *identity]) == 0
    assert "complete, nothing to do" in capsys.readouterr().err
    with (
        tuned(load_model(tiny_config), tiny_config, 0, found[0].folder) as model,
        pytest.raises(NoMomentsError, match=r"checkpoint-1: .*preconditioner: identity"),
    ):
        found[0].adam(model).v["any"]


def test_sharded_weights_and_moments(tiny_config: ModelSection, theirs: Path, tmp_path: Path) -> None:
    """As FSDP with SHARDED_STATE_DICT leaves them: two folders of torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp

    plain = imported(tiny_config, [theirs], tmp_path / "plain")
    model = adapted(tiny_config)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for step in STEPS:
        folder = theirs / f"checkpoint-{step}"
        weights = load_file(folder / "adapter_model.safetensors")
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        named = {"state": {names[key]: value for key, value in state["state"].items()}}
        groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
        dcp.save({"model": weights}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
        dcp.save({"optimizer": {**named, "param_groups": groups}}, checkpoint_id=folder / "optimizer_0", no_dist=True)
        (folder / "optimizer.pt").unlink()
        (folder / "adapter_model.safetensors").unlink()
    for left, right in zip(plain, imported(tiny_config, [theirs], tmp_path / "sharded"), strict=True):
        for name in ("adapter_model.safetensors", "moments.safetensors", "state.json"):
            assert (left.folder / name).read_bytes() == (right.folder / name).read_bytes()
