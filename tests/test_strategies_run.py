"""Every strategy in a run: what it needs is collected, and nothing else; the pool as its own target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gradpursuit.cli import main
from gradpursuit.config import load_config
from gradpursuit.data import Table
from gradpursuit.estimate import estimate
from gradpursuit.pipeline import Run
from gradpursuit.selection import STRATEGIES, strategy
from gradpursuit.selection_problem import load_problem
from gradpursuit.store import GradientStore
from jobs import Job

OPTIONS = {"gtp-target": {"selector": "gtp", "subspace": "target", "rank": 4}, "random-matched": {"like": "less"}}
IN_DOMAIN = ["gtp", "kmeans-quality", "el2n", "random", "less", "gradmatch", "learning-percentage"]


def begun(folder: Path, tiny_path: Path, strategies: list[str], **changes: Any) -> Job:
    job = Job(folder, tiny_path)
    job.save(selection={"strategies": strategies, "options": OPTIONS}, **changes)
    assert main(["warmup", str(job.path)]) == 0
    assert main(["collect", str(job.run_dir)]) == 0
    return job


@pytest.fixture(scope="module")
def every(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run of all strategies, up to the selection."""
    job = begun(tmp_path_factory.mktemp("every"), tiny_path, [*STRATEGIES, "gtp-target"])
    assert main(["select", str(job.run_dir)]) == 0
    return job


@pytest.fixture
def run(every: Job, tmp_path: Path) -> Path:
    return Path(shutil.copytree(every.run_dir, tmp_path / "run"))


def test_all_of_them_choose(every: Job) -> None:
    made = Run(load_config(every.run_dir / "config.yaml"))
    assert set(made.selections()) == {*STRATEGIES, "gtp-target"}
    for name, draws in made.selections().items():
        assert len(draws) == (2 if strategy(name, OPTIONS).stochastic else 1), name
        for draw in draws:
            assert len(set(draw.indices.tolist())) == 5, name
            assert draw.weights.mean() == pytest.approx(1)
    gtp, narrow = (made.selections()[name][0] for name in ("gtp", "gtp-target"))
    assert gtp.evidence["relative_residual"] != narrow.evidence["relative_residual"]


def test_the_problem_holds_the_signals(every: Job) -> None:
    problem, candidates = load_problem(Run(load_config(every.run_dir / "config.yaml")))
    assert {name: (f.checkpoints, len(f)) for name, f in problem.pool.items()} == {
        **dict.fromkeys(("adam-symmetric", "adam-uncorrected", "identity"), (2, 31)),
        "embedding": (1, 31),
        "el2n": (3, 31),
    }
    assert {name: len(f) for name, f in problem.target.items()} == dict.fromkeys(
        ("adam-symmetric", "identity", "embedding"), 6
    )
    losses = problem.pool["el2n"].columns["loss"]
    np.testing.assert_allclose(losses[1:], problem.pool["identity"].columns["loss"], rtol=1e-4)
    np.testing.assert_allclose(losses[:1], problem.pool["embedding"].columns["loss"], rtol=1e-4)
    assert losses[0].mean() > losses[2].mean() + 0.1, "the base model, and the end of the warm-up"
    assert problem.text is not None
    assert problem.text(problem.rows[3]) == "What is 3 plus 3?\nIt is 9.", "without the chat template"
    assert all("<" not in problem.text(row) for row in problem.target_rows)
    assert [row.id for row in problem.rows] == list(problem.ids)
    assert candidates.tolist() == list(range(31))


def test_only_what_is_needed_is_collected(tiny_path: Path, tmp_path: Path) -> None:
    job = begun(tmp_path, tiny_path, ["dsir", "rds", "random"])
    stores = sorted(
        path.parent.relative_to(job.run_dir).as_posix() for path in job.run_dir.glob("gradients/**/manifest.json")
    )
    assert stores == ["gradients/pool/embedding", "gradients/target/embedding"]
    shards = list(job.run_dir.glob("gradients/**/*.safetensors"))
    stamps = {path: path.stat().st_mtime_ns for path in shards}
    job.save(selection={"strategies": ["rds", "el2n"]})
    assert main(["run", str(job.path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in shards} == stamps, "embeddings are there already"
    assert GradientStore.open(job.run_dir / "gradients/pool/el2n").spec.checkpoints == 3


def test_status_counts_and_verify_checks_the_signals(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def gradients() -> dict[str, Any]:
        capsys.readouterr()
        assert main(["status", str(run), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["stages"][2]
        return found

    # gradients of both, embeddings of both, errors of the pool at the base model and two checkpoints
    total = 2 * (6 + 31) + (6 + 31) + 3 * 31
    assert (gradients()["state"], gradients()["done"], gradients()["total"]) == ("complete", total, total)
    assert main(["verify", str(run), "--sample", "3"]) == 2  # export and what follows were not run
    told = capsys.readouterr()
    assert "pool/el2n (float32): 3 rows computed again" in told.out
    assert "target/embedding (float32): 3 rows computed again" in told.out
    assert "comes out differently" not in told.err
    shard = run / "gradients/pool/el2n/checkpoint-3/shard-00001.safetensors"
    kept = shard.read_bytes()
    shard.unlink()
    assert (gradients()["state"], gradients()["done"]) == ("damaged", total - 8)
    assert main(["collect", str(run)]) == 0
    assert shard.read_bytes() == kept


def test_a_wrong_error_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    store = GradientStore.open(run / "gradients/pool/el2n")
    for t in range(3):
        for s in range(4):
            shard = store.read(t, s)
            store.write(t, s, replace(shard, features=np.array(shard.features) * 1.05))
    assert main(["verify", str(run), "--sample", "2"]) == 2
    assert "pool/el2n: the feature of" in (text := capsys.readouterr().err)
    assert "comes out differently" in text


def test_estimate_counts_the_signals(every: Job) -> None:
    found = estimate(load_config(every.path))
    gradients = 2 * 256 * 4 * (3 * 31 + 2 * 6)
    signals = 32 * 4 * (31 + 6) + 3 * 4 * 31
    assert found.stages["gradients"].disk == gradients + signals
    assert found.stages["gradients"].seconds > 0


def test_fewer_strategies_need_no_other_features(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = {path: path.stat().st_mtime_ns for path in run.glob("gradients/**/*.*")}
    assert main(["select", str(run), "--selection.strategies", "gtp,el2n"]) == 0
    assert main(["status", str(run), "--json"]) == 0
    capsys.readouterr()
    assert main(["collect", str(run)]) == 0
    assert "gradients: complete, nothing to do" in " ".join(capsys.readouterr().err.split())
    shard = next(run.glob("gradients/pool/el2n/**/*.safetensors"))
    kept = shard.read_bytes()
    shard.unlink()
    assert main(["collect", str(run)]) == 0, "what a part of the strategies needs is mended"
    assert shard.read_bytes() == kept
    assert main(["select", str(run), "--selection.strategies", "gtp,less,rds"]) == 0, "and all others are there still"
    after = {path: path.stat().st_mtime_ns for path in run.glob("gradients/**/*.*")}
    assert {path for path in after if after[path] != stores[path]} <= {shard, run / "gradients/dropped.jsonl"}
    assert main(["collect", str(run), "--selection.strategies", "gtp", "--gradients.dim", "128"]) == 0
    capsys.readouterr()
    assert main(["select", str(run), "--selection.strategies", "gtp,rds"]) == 2, "with these settings only those of gtp"
    assert "needs 'gradients', which is not complete" in capsys.readouterr().err


def test_an_option_is_part_of_what_a_selection_depends_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "selection/gtp-target/path.json").read_bytes()
    words = ["--selection.options.gtp-target.rank", "3"]
    assert main(["select", str(run), *words]) == 0, "the features are the same"
    assert (run / "selection/gtp-target/path.json").read_bytes() != before
    assert yaml.safe_load((run / "config.yaml").read_text())["selection"]["options"]["gtp-target"]["rank"] == 3
    assert main(["select", str(run), "--selection.options.gtp-target.preconditioner", "adam-centered"]) == 2
    assert "needs 'gradients', which is not complete" in capsys.readouterr().err
    assert main(["select", str(run), "--selection.options.gtp-target.rnk", "3"]) == 2
    assert "unknown key 'rnk' in section 'selection.options.gtp-target'; did you mean 'rank'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def in_domain(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run whose pool is its own target, up to the selection; pool rows are set aside to score."""
    folder = tmp_path_factory.mktemp("in-domain")
    job = Job(folder, tiny_path)
    (folder / "heldout.jsonl").unlink()
    (folder / "target.jsonl").unlink()
    job.save(
        data={"target": None, "heldout": []},
        selection={"strategies": IN_DOMAIN, "options": {"gtp": {"preconditioner": "adam"}}},
        evaluation={"seeds": 1, "holdout": 0.2},
    )
    assert main(["run", str(job.path)]) == 0
    return job


def test_the_pool_is_its_own_target(in_domain: Job) -> None:
    made = Run(load_config(in_domain.run_dir / "config.yaml"))
    assert made.config.data.in_domain
    pool, heldout = made.table("pool"), made.table("heldout")
    assert (len(made.table("target")), len(heldout)) == (0, 31 - len(pool))
    assert 6 <= len(heldout) <= 7  # a fifth of the distinct rows, copies on one side
    assert not {row.hash for row in pool} & {row.hash for row in heldout}
    stores = {path.parent.name for path in in_domain.run_dir.glob("gradients/pool/*/manifest.json")}
    assert stores == {"adam", "adam-uncorrected", "adam-symmetric", "identity", "embedding", "el2n"}
    assert not list(in_domain.run_dir.glob("gradients/target/*"))
    problem, _ = load_problem(made)
    matrix, b = problem.matching("adam")
    plain = problem.pool["identity"]
    for t, part in enumerate(np.split(b, 2)):
        mean = plain.at(t).mean(axis=0)
        cosine = part @ mean / np.linalg.norm(part) / np.linalg.norm(mean)
        assert cosine == pytest.approx(1), "the target is the mean plain gradient of all pool rows"
    assert matrix.shape[1] == len(pool)
    assert set(made.selections()) == set(IN_DOMAIN)
    assert all(len(set(draws[0].indices.tolist())) == 5 for draws in made.selections().values())
    losses = {line.strategy: line.losses for line in made.lines()}
    assert set(losses) == {*IN_DOMAIN, "full"}
    rows = made.manifest.entry("selection")["detail"]["rows"]
    assert rows == {"pool": len(pool), "target": 0, "heldout": len(heldout)}


def test_another_target_can_be_added_to_an_in_domain_run(in_domain: Job, tmp_path: Path) -> None:
    run = Path(shutil.copytree(in_domain.run_dir, tmp_path / "run"))
    rows = [in_domain.row(i, "times") for i in range(8)]
    in_domain.write("times.jsonl", rows)
    assert main(["target", "add", str(run), "--name", "times", "--file", str(in_domain.folder / "times.jsonl")]) == 0
    assert sorted(path.name for path in (run / "targets/times/gradients/target").iterdir()) == [
        "adam-symmetric", "embedding", "identity",
    ]  # fmt: skip
    assert main(["select", str(run), "--selection.target", "times"]) == 0
    made = Run(load_config(run / "config.yaml"))
    assert not made.in_domain
    problem, _ = load_problem(made)
    assert len(problem.target["identity"]) == len(problem.target_rows) < 8
    assert main(["select", str(run), "--selection.target", "null"]) == 0


def test_how_an_in_domain_run_is_asked_for(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job(tmp_path, tiny_path)
    assert load_config(job.path, ["data.target=pool"]).data.target is None
    assert load_config(job.path, ["data.target=null"]).data.in_domain
    assert not load_config(job.path, ["data.target=[pool]"]).data.in_domain, "a file of that name, in a list"
    assert main(["run", str(job.path), "--data.target", "pool", "--selection.strategies", "gtp,rds"]) == 2
    assert "'rds' needs the rows of a target, but data.target is the pool itself" in capsys.readouterr().err
    assert not job.run_dir.exists()


def test_heldout_files_are_taken_out_of_an_in_domain_pool(tiny_path: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, tiny_path)
    job.write("heldout.jsonl", [job.row(3), job.row(4)])
    job.save(data={"target": "pool"}, selection={"strategies": ["random"]})
    assert main(["warmup", str(job.path)]) == 0
    assert len(Table.read(job.run_dir / "data/pool.parquet")) == 28, "3, its copy, and 4 are held out"
    assert len(Table.read(job.run_dir / "data/heldout.parquet")) == 2
    before = Run(load_config(job.path)).fingerprint("data")
    job.save(data={"target": str(tmp_path / "heldout.jsonl"), "heldout": []})
    assert Run(load_config(job.path)).fingerprint("data") != before
