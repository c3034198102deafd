from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from gradpursuit import pipeline
from gradpursuit.cli import main
from gradpursuit.config import load_config
from gradpursuit.errors import RunError, SelectionError
from gradpursuit.manifest import Manifest
from gradpursuit.marker import run_id
from gradpursuit.pipeline import Run
from gradpursuit.stages import STAGES, Stage
from jobs import Job

STAGE_NAMES = [stage.name for stage in STAGES]


def chosen(folder: Path) -> dict[str, bytes]:
    """The exported bytes of every strategy."""
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("selection/*/selected.jsonl"))}


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages whose work is done from now on."""
    done: list[str] = []

    def wrap(stage: Any) -> Any:
        def work(run: Run) -> dict[str, Any]:
            done.append(stage.name)
            return stage.work(run)

        return Stage(**{**vars(stage), "work": work})

    monkeypatch.setattr(pipeline, "STAGES", tuple(wrap(stage) for stage in STAGES))
    return done


def small_job(folder: Path, model: Path) -> Job:
    """A job that fine-tunes once for each strategy."""
    job = Job(folder, model)
    job.save(evaluation={"seeds": 1})
    return job


@pytest.fixture
def job(tiny_path: Path, tmp_path: Path) -> Job:
    return small_job(tmp_path, tiny_path)


@pytest.fixture(scope="module")
def template(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    job = small_job(tmp_path_factory.mktemp("template"), tiny_path)
    assert main(["run", str(job.path)]) == 0
    return job.run_dir


@pytest.fixture
def finished(template: Path, job: Job) -> Job:
    """A finished run: moving one elsewhere changes nothing."""
    shutil.copytree(template, job.run_dir)
    return job


def test_a_run_leaves_the_folder_of_the_design(finished: Job) -> None:
    folder = finished.run_dir
    for name in (
        "config.yaml",
        "manifest.json",
        "log.txt",
        "report.html",
        "report.json",
        "data/pool.parquet",
        "data/target.parquet",
        "data/heldout.parquet",
        "data/dropped.jsonl",
        "trajectory/checkpoint-1/adapter_model.safetensors",
        "trajectory/checkpoint-2/moments.safetensors",
        "gradients/pool/adam-symmetric/checkpoint-2/shard-00003.safetensors",
        "gradients/pool/adam-uncorrected/manifest.json",
        "gradients/target/identity/manifest.json",
        "selection/gtp/selection.parquet",
        "selection/gtp/path.json",
        "evaluation/results.jsonl",
        "evaluation/table.csv",
    ):
        assert (folder / name).is_file(), name
    assert not list(folder.rglob("*.part"))
    assert set(chosen(folder)) == {"gtp", "less", "random"}
    for exported in chosen(folder).values():
        rows = [json.loads(line) for line in exported.decode().splitlines()]
        assert len(rows) == 5
        assert sum(row["weight"] for row in rows) / 5 == pytest.approx(1)
        assert sorted(row["rank"] for row in rows) == [1, 2, 3, 4, 5]
        originals = {
            row["id"]: row for row in map(json.loads, (finished.folder / "pool.jsonl").read_text().splitlines())
        }
        for row in rows:
            assert originals[row["id"]].items() <= row.items()
    manifest = Manifest(folder).read()
    assert [entry["state"] for entry in manifest["stages"].values()] == ["complete"] * len(STAGES)
    assert manifest["packages"]["torch"]
    losses = [line["mean"] for line in json.loads((folder / "report.json").read_text())["comparison"]["rows"]]
    assert all(0 < loss < 20 for loss in losses)


def test_a_finished_run_is_not_run_again_and_replays_elsewhere(
    finished: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done, before = counted(monkeypatch), chosen(finished.run_dir)
    assert main(["run", str(finished.run_dir / "config.yaml")]) == 0
    assert done == []
    assert main(["run", str(finished.run_dir / "config.yaml"), "--run-dir", str(tmp_path / "elsewhere")]) == 0
    assert done == STAGE_NAMES
    assert chosen(tmp_path / "elsewhere") == before


def test_killed_after_every_stage_the_run_ends_with_the_same_selection(
    finished: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each stage is done by a run that knows nothing but the folder, and never one of those before it."""
    config = load_config(finished.path).model_copy(update={"run_dir": str(tmp_path / "killed")})
    done = counted(monkeypatch)
    for number, name in enumerate(STAGE_NAMES, start=1):
        Run(config).execute(name)
        assert done == STAGE_NAMES[:number]
    assert chosen(tmp_path / "killed") == chosen(finished.run_dir)


def test_only_what_a_changed_setting_touches_is_made_anew(finished: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    done = counted(monkeypatch)
    run = ["run", str(finished.path)]
    assert main([*run, "--evaluation.epochs", "2"]) == 0
    assert done == ["evaluation", "report"]
    done.clear()
    assert main([*run, "--evaluation.epochs", "2", "--selection.k", "4"]) == 0
    assert done == ["selection", "export", "evaluation", "report"]
    assert all(len(text.splitlines()) == 4 for text in chosen(finished.run_dir).values())
    done.clear()
    assert main([*run, "--warmup.learning_rate", "0.02"]) == 0
    assert done == STAGE_NAMES[1:]
    done.clear()
    finished.write("pool.jsonl", [finished.row(i) for i in range(25)])
    assert main([*run, "--warmup.learning_rate", "0.02"]) == 0
    assert done == STAGE_NAMES


def test_damaged_or_deleted_outputs_are_made_again(finished: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    before = chosen(finished.run_dir)
    shards = sorted((finished.run_dir / "gradients/pool/adam-symmetric").rglob("*.safetensors"))
    content = bytearray(shards[2].read_bytes())
    content[-5] ^= 1
    shards[2].write_bytes(content)
    shards[5].unlink()
    untouched = shards[0].stat().st_mtime_ns
    (finished.run_dir / "selection/gtp/selected.jsonl").unlink()
    done = counted(monkeypatch)
    assert main(["run", str(finished.path)]) == 0
    assert done == ["gradients", "export"]
    assert shards[0].stat().st_mtime_ns == untouched
    content[-5] ^= 1
    assert shards[2].read_bytes() == bytes(content)
    assert chosen(finished.run_dir) == before


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("data/pool.parquet", ["data"]),
        ("trajectory/checkpoint-1/adapter_model.safetensors", ["trajectory"]),
        ("selection/gtp/selection.parquet", ["selection", "export"]),
        ("selection/less/selected.jsonl", ["export"]),
        ("evaluation/results.jsonl", ["evaluation"]),
        ("report.html", ["report"]),
    ],
)
def test_a_file_that_is_not_what_was_written_is_made_again(
    finished: Job, monkeypatch: pytest.MonkeyPatch, name: str, stages: list[str]
) -> None:
    before, path = chosen(finished.run_dir), finished.run_dir / name
    done = counted(monkeypatch)
    for damage in (lambda: path.write_bytes(path.read_bytes()[:-20]), path.unlink):
        damage()
        done.clear()
        assert main(["run", str(finished.path)]) == 0
        assert done == stages
        assert path.is_file()
    assert chosen(finished.run_dir) == before


def test_a_lost_checkpoint_is_trained_again(finished: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    before = chosen(finished.run_dir)
    path = finished.run_dir / "trajectory/checkpoint-2"
    content = (path / "moments.safetensors").read_bytes()
    shutil.rmtree(path)
    done = counted(monkeypatch)
    assert main(["run", str(finished.path)]) == 0
    assert done == ["trajectory"]
    assert (path / "moments.safetensors").read_bytes() == content
    assert chosen(finished.run_dir) == before


def test_strategies_that_are_no_longer_asked_for_leave_nothing_behind(
    finished: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = counted(monkeypatch)
    assert main(["run", str(finished.path), "--selection.strategies", "[bids, el2n, gtp]"]) == 0
    assert done == ["gradients", "selection", "export", "evaluation", "report"]
    assert set(chosen(finished.run_dir)) == {"bids", "el2n", "gtp"}


def test_strategies_by_features_that_are_there_need_no_new_ones(
    finished: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = counted(monkeypatch)
    assert main(["select", str(finished.run_dir), "--selection.strategies", "gtp,omp,dsir"]) == 0
    assert done == ["selection"]
    assert main(["compare", str(finished.run_dir)]) == 0
    assert done == ["selection", "export", "evaluation", "report"]
    assert set(chosen(finished.run_dir)) == {"gtp", "omp", "dsir"}
    capsys.readouterr()
    assert main(["verify", str(finished.run_dir), "--sample", "0"]) == 0, capsys.readouterr().err


def test_the_command_that_is_needed_first_has_the_same_source_and_flags(
    finished: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    flags = ["--evaluation.seeds", "4", "--selection.strategies", "[gtp, random]"]
    assert main(["compare", str(finished.run_dir), *flags]) == 2
    command = f"gradpursuit select {finished.run_dir} --evaluation.seeds=4 '--selection.strategies=[gtp, random]'"
    assert f"run `{command}` first" in capsys.readouterr().err
    assert main(shlex.split(command)[1:]) == 0
    assert main(["compare", str(finished.run_dir), *flags]) == 0

    elsewhere = tmp_path / "elsewhere"
    assert main(["select", str(finished.path), "--run-dir", str(elsewhere)]) == 2
    command = f"gradpursuit warmup {finished.path} --run-dir {elsewhere}"
    assert f"run `{command}` first" in capsys.readouterr().err
    assert not elsewhere.exists()
    assert main(shlex.split(command)[1:]) == 0


def test_stages_run_one_by_one_and_in_order_only(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match=r"'selection' needs 'data', which is not complete.*gradpursuit warmup"):
        Run(load_config(job.path)).execute("selection", first="selection")
    assert not (job.run_dir / "manifest.json").exists()
    done = counted(monkeypatch)
    for verb, stages in (
        ("warmup", ["data", "trajectory"]),
        ("collect", ["gradients"]),
        ("select", ["selection"]),
        ("export", ["export"]),
        ("compare", ["evaluation", "report"]),
        ("select --pursuit.alpha=1", ["selection"]),
        ("compare", ["export", "evaluation", "report"]),
    ):
        done.clear()
        name, *flags = verb.split()
        assert main([name, str(job.path if name == "warmup" else job.run_dir), *flags]) == 0
        assert done == stages


def test_selection_does_not_depend_on_shard_size_or_batch(finished: Job, tmp_path: Path) -> None:
    settings = ["--gradients.shard_rows", "31", "--gradients.tokens_per_batch", "100"]
    assert main(["run", str(finished.path), "--run-dir", str(tmp_path / "other"), *settings]) == 0
    for name, text in chosen(finished.run_dir).items():
        mine = [json.loads(line) for line in text.splitlines()]
        other = [json.loads(line) for line in chosen(tmp_path / "other")[name].splitlines()]
        assert [row["id"] for row in mine] == [row["id"] for row in other]
        assert [row["weight"] for row in mine] == pytest.approx([row["weight"] for row in other], rel=1e-3)


def test_exact_copies_are_chosen_at_most_once_by_the_pursuit(job: Job) -> None:
    rows = [{**job.row(i), "id": f"{i}-{c}"} for i in range(12) for c in range(3)]
    job.write("pool.jsonl", rows)
    job.save(selection={"strategies": ["gtp", "less"], "k": 8})
    assert main(["run", str(job.path)]) == 0
    ids = [json.loads(line)["id"].split("-")[0] for line in chosen(job.run_dir)["gtp"].splitlines()]
    assert len(ids) == len(set(ids)) == 8
    greedy = [json.loads(line)["id"].split("-")[0] for line in chosen(job.run_dir)["less"].splitlines()]
    assert len(set(greedy)) < 8, "top-k takes copies: without them this test would show nothing"


def test_k_larger_than_the_pool_is_refused_before_any_training(job: Job) -> None:
    job.save(selection={"k": 32})
    with pytest.raises(SelectionError, match=r"selection\.k = 32, but the cleaned pool has only 31"):
        Run(load_config(job.path)).execute("report")
    assert not (job.run_dir / "trajectory").exists()


def test_gpu_and_cpu_choose_alike(finished: Job, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    arguments = ["run", str(finished.path), "--run-dir", str(tmp_path / "gpu"), "--model.device", "cuda"]
    assert main(arguments) == 0
    mine = {json.loads(line)["id"] for line in chosen(finished.run_dir)["gtp"].splitlines()}
    other = {json.loads(line)["id"] for line in chosen(tmp_path / "gpu")["gtp"].splitlines()}
    assert len(mine & other) >= 4


def test_layers_of_the_model_itself_are_followed_to_the_end(tiny_path: Path, tmp_path: Path) -> None:
    """Without an adapter: warm-up, features, selection, fine-tuning and a check of it all."""
    from gradpursuit.store import GradientStore

    job = Job(tmp_path, tiny_path)
    job.tree["model"]["layers"] = r".*layers\.1\.mlp\.down_proj"
    job.save(evaluation={"seeds": 1})
    assert main(["run", str(job.path)]) == 0
    assert main(["verify", str(job.run_dir), "--sample", "4"]) == 0
    store = GradientStore.open(job.run_dir / "gradients" / "pool" / "adam-symmetric")
    assert store.spec.origin["projection"]["source_size"] == 32 * 64
    assert store.spec.origin["adapter"] == {"lora": None, "layers": r".*layers\.1\.mlp\.down_proj"}


def test_a_budget_that_is_refused_changes_nothing(tiny_path: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, tiny_path)
    for verb in ("warmup", "collect", "select"):
        assert main([verb, str(job.path)]) == 0
    files = [job.run_dir / "config.yaml", *sorted((job.run_dir / "selection").rglob("*.parquet"))]
    before = [path.read_bytes() for path in files]
    assert main(["select", str(job.run_dir), "--selection.k", "32"]) == 2
    assert [path.read_bytes() for path in files] == before
    assert main(["select", str(job.run_dir)]) == 0


def diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every training take steps that no setting allows."""
    from dataclasses import replace

    from gradpursuit.trajectory import training

    arguments = training._arguments

    def made(spec: training.TrainSpec, *rest: Any) -> Any:
        return arguments(replace(spec, learning_rate=1e30), *rest)

    monkeypatch.setattr(training, "_arguments", made)


@pytest.mark.parametrize(
    ("verb", "setting", "words"),
    [
        ("warmup", ["--warmup.learning_rate", "0.5"], "the training loss is"),
        ("warmup", ["--data.max_tokens", "9"], "longer than max_tokens"),
        ("warmup", ["--model.lora.target_modules", "nothing"], "target_modules='nothing'"),
        ("compare", ["--evaluation.learning_rate", "0.5"], "the training loss is"),
    ],
)
def test_a_setting_that_is_refused_leaves_a_finished_run_as_it_was(
    finished: Job,
    verb: str,
    setting: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "training loss" in words:
        diverge(monkeypatch)

    def files() -> dict[Path, bytes]:
        found = [path for path in finished.run_dir.rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in found if path.name not in ("log.txt", ".lock")}

    before = files()
    assert main([verb, str(finished.run_dir), *setting]) == 2
    assert words in capsys.readouterr().err
    assert files() == before
    assert not list(finished.run_dir.rglob(".*.gradpursuit-*"))


@pytest.mark.parametrize("name", ["data/pool.parquet", "trajectory/checkpoint-1/state.json"])
def test_a_damaged_file_is_named(finished: Job, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = finished.run_dir / name
    path.write_bytes(path.read_bytes() + b" ")
    assert main(["select", str(finished.run_dir)]) == 2
    message = capsys.readouterr().err
    assert f"{path}: not what " in message
    assert "needs it: put it back from a copy, or run `gradpursuit" in message
    assert path.read_bytes().endswith(b" ")


def test_inputs_where_the_run_writes_are_refused(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("data/pool.jsonl", "selection/pool.jsonl", "exports/k-3/pool.jsonl"):
        job.save(data={"pool": str(job.run_dir / name)})
        (job.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (job.run_dir / name).write_text((job.folder / "pool.jsonl").read_text())
        run_id(job.run_dir)
        assert main(["run", str(job.path)]) == 2
        assert f"data.pool: {job.run_dir / name} lies where the run writes" in capsys.readouterr().err
        assert (job.run_dir / name).read_text() == (job.folder / "pool.jsonl").read_text()


def test_rows_without_a_gradient_are_listed_and_never_chosen(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One pool row is made to fail as a row whose loss is not finite does."""
    from gradpursuit.gradients import engine

    job = Job(tmp_path, tiny_path)
    job.tree["gradients"]["max_dropped"] = 0.05
    job.save(selection={"strategies": ["gtp", "less"], "k": 30})
    assert main(["warmup", str(job.path)]) == 0
    batch = engine.FeatureEngine.batch

    def without_one(self: Any, rows: Any) -> Any:
        found = batch(self, rows)
        for place, row in enumerate(rows):
            if row.id == "plus-11":
                found.loss[place] = float("nan")
        return found

    monkeypatch.setattr(engine.FeatureEngine, "batch", without_one)
    assert main(["collect", str(job.path)]) == 0
    monkeypatch.undo()
    assert "no features for 1 rows of pool: the loss is nan" in capsys.readouterr().err
    (listed,) = [json.loads(line) for line in (job.run_dir / "gradients" / "dropped.jsonl").read_text().splitlines()]
    assert (listed["id"], listed["split"], listed["line"]) == ("plus-11", "pool", 12)
    assert main(["select", str(job.path)]) == 0
    assert main(["export", str(job.path)]) == 0
    for strategy in ("gtp", "less"):
        lines = (job.run_dir / "selection" / strategy / "selected.jsonl").read_text().splitlines()
        chosen = [json.loads(line)["id"] for line in lines]
        assert "plus-11" not in chosen
        assert len(set(chosen)) == len(chosen) > 20
    files = {path: path.read_bytes() for path in job.run_dir.rglob("*") if path.is_file() and path.name != "log.txt"}
    assert main(["collect", str(job.run_dir), "--gradients.max_dropped", "0"]) == 2
    assert "more than gradients.max_dropped = 0 allows" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files} == files
    assert main(["export", str(job.run_dir)]) == 0
    assert main(["select", str(job.path), "--selection.k", "31"]) == 2
    assert "only 30 of the 31 examples of the pool can be chosen" in capsys.readouterr().err


def test_training_that_diverges_is_an_error(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    diverge(monkeypatch)
    job = Job(tmp_path, tiny_path)
    assert main(["warmup", str(job.path)]) == 2
    err = capsys.readouterr().err
    assert "the training loss is" in err
    assert "lower warmup.learning_rate" in err
    assert "Traceback" not in err


def test_a_budget_above_the_pool_is_refused_before_the_warm_up(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.save(evaluation={"budgets": [50]})
    assert main(["run", str(job.path)]) == 2
    assert "evaluation.budgets: 50 examples, but the cleaned pool has only 31" in capsys.readouterr().err
    assert not (job.run_dir / "trajectory").exists()
