"""`gradpursuit export`: every budget out of one finished selection, and what trainers make of the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from gradpursuit.cli import main
from gradpursuit.opening import read_config
from gradpursuit.pipeline import Run
from gradpursuit.selection import Selection
from jobs import Job


@pytest.fixture(scope="module")
def exported(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run up to its export, of two sources; what was computed for the selection is not there any more."""
    job = Job(tmp_path_factory.mktemp("export"), tiny_path)
    job.write("more.jsonl", [job.row(i, "minus") for i in range(20)])
    sources = [{"path": str(job.folder / "pool.jsonl"), "name": "sums"}, str(job.folder / "more.jsonl")]
    job.save(data={"pool": sources}, selection={"k": 16, "strategies": ["gtp", "less"]})
    for verb in ("warmup", "collect", "select", "export"):
        assert main([verb, str(job.path), "--quiet"]) == 0
    for name in ("gradients", "trajectory"):
        shutil.rmtree(job.run_dir / name)
    return job


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def budget(job: Job, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """What an export with a budget says of itself."""
    capsys.readouterr()
    assert main(["export", str(job.run_dir), "--json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(job: Job, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    assert main(["export", str(job.run_dir), *flags]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1, message
    return message.removeprefix("gradpursuit: error: ")


def selection(job: Job, strategy: str) -> Selection:
    return Run(read_config(job.run_dir / "config.yaml", [])).selections()[strategy][0]


def test_the_stage_writes_whole_selections(exported: Job) -> None:
    for strategy in ("gtp", "less"):
        folder = exported.run_dir / "selection" / strategy
        rows = lines(folder / "selected.jsonl")
        assert len(rows) == 16
        assert np.mean([row["weight"] for row in rows]) == pytest.approx(1)
        assert {row["source"] for row in rows} <= {"sums", "more.jsonl"}
        assert len(lines(folder / "repeated.jsonl")) == 64
        assert "of 51 rows of a pool" in (folder / "README.md").read_text("utf-8")
    found = json.loads((exported.run_dir / "manifest.json").read_text())["stages"]["export"]
    assert found["detail"]["strategies"]["gtp"]["rows"] == 16
    assert "selection/gtp/dataset/state.json" in found["outputs"]


def test_smaller_budgets_need_no_gradients_and_leave_the_run_alone(
    exported: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in exported.run_dir.rglob("*.*") if "exports" not in path.parts}
    found = budget(exported, capsys, "--fraction", "0.1")
    folder = exported.run_dir / "exports" / "fraction-0.1"
    assert found["folder"] == str(folder)
    assert found["files"] == [str(folder / "gtp"), str(folder / "less")]
    assert found["next"] == f"gradpursuit compare {exported.run_dir} --evaluation.budgets 6"
    for strategy in ("gtp", "less"):
        made = selection(exported, strategy)
        subset = next(kept for kept in (*made.path, made) if len(kept.indices) >= 6)
        pool = Run(read_config(exported.run_dir / "config.yaml", [])).table("pool")
        wanted = [pool[index].id for index in subset.indices[:6].tolist()]
        rows = lines(folder / strategy / "selected.jsonl")
        assert [row["id"] for row in sorted(rows, key=lambda row: row["rank"])] == wanted
        assert np.mean([row["weight"] for row in rows]) == pytest.approx(1)
    assert json.loads((folder / "export.json").read_text())["asked"] == {"fraction": 0.1}
    after = {path: path.read_bytes() for path in exported.run_dir.rglob("*.*") if "exports" not in path.parts}
    assert {path for path in after if before.get(path) != after[path]} <= {exported.run_dir / "log.txt"}


def test_the_knee_is_taken_and_explained(exported: Job, capsys: pytest.CaptureFixture[str]) -> None:
    evidence = selection(exported, "gtp").evidence
    found = budget(exported, capsys, "--k", "auto")
    assert found["knee"] == {"strategy": "gtp", **evidence["knee"]}
    assert found["strategies"]["gtp"]["rows"] == found["strategies"]["less"]["rows"] == evidence["knee"]["budget"]
    assert found["budget"].endswith(
        "the knee of gtp: the smallest budget on the path that brings 95 % of what the first layer brings"
    )
    assert main(["export", str(exported.run_dir), "--k", "auto"]) == 0
    assert "the knee of gtp" in " ".join(capsys.readouterr().err.split())
    assert "no path" not in refused(exported, capsys, "--k", "auto", "--strategies", "less")


def test_tokens_sources_repeats_and_the_folder(
    exported: Job, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = budget(exported, capsys, "--tokens", "60", "--strategies", "gtp")
    assert list(found["strategies"]) == ["gtp"]
    assert found["next"].endswith(f" --evaluation.budgets {found['strategies']['gtp']['rows']}")
    assert 40 < found["strategies"]["gtp"]["tokens"]["supervised"] <= 60
    found = budget(exported, capsys, "--tokens", "200", "--count", "total", "--strategies", "gtp")
    assert 150 < found["strategies"]["gtp"]["tokens"]["total"] <= 200
    bounds = ["--max-per-source", "sums=0.5", "--min-per-source", "more.jsonl=1"]
    out = ["--out", str(tmp_path / "out"), "--repeats", "21", "--strategies", "gtp"]
    held = [row["source"] for row in lines(exported.run_dir / "selection/gtp/selected.jsonl")]
    assert min(held.count("sums"), held.count("more.jsonl")) >= 2
    found = budget(exported, capsys, "--k", "4", *bounds, *out)
    assert found["folder"] == str(tmp_path / "out")
    assert found["strategies"]["gtp"]["sources"] == {"sums": 2, "more.jsonl": 2}
    assert len(lines(tmp_path / "out/gtp/repeated.jsonl")) == found["strategies"]["gtp"]["repeated"] == 21
    (tmp_path / "mine").mkdir()
    message = refused(exported, capsys, "--k", "4", "--out", str(tmp_path / "mine"))
    assert "is there already and is no export, or has lost its export.json; move it away, or choose another" in message
    for name in ("notes.txt", "gtp/notes.txt", "gtp/dataset/notes.txt"):
        (tmp_path / "out" / name).write_text("mine")
        message = refused(exported, capsys, "--k", "4", "--out", str(tmp_path / "out"))
        assert f"{tmp_path / 'out' / name}: no file of this export; move it elsewhere" in message
        (tmp_path / "out" / name).unlink()
    for place in ("s3://bucket/out", "hf:/x"):
        assert "an export lies on a disk; name a folder" in refused(exported, capsys, "--k", "4", "--out", place)
    for inside in ("", "data", "selection/gtp", "gradients/x"):
        message = refused(exported, capsys, "--k", "4", "--out", str(exported.run_dir / inside))
        assert "the run writes here itself; choose another folder (--out)" in message
    (tmp_path / "mine" / "export.json").write_text('{"name": "of another program"}')
    message = refused(exported, capsys, "--k", "4", "--out", str(tmp_path / "mine"))
    assert "is there already and is no export, or has lost its export.json; move it away, or choose another" in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--k", "17"],
            "gtp: the budget is 17 rows, but the selection holds only 16; ask for less, or select more rows",
        ),
        (["--fraction", "0.9"], "the budget is 46 rows, but the selection holds only 16"),
        (["--tokens", "1"], "its best row alone has"),
        (["--k", "4", "--tokens", "9"], "k and tokens are given together: give one of them"),
        (
            ["--k", "4", "--count", "total"],
            "count (--count) says which tokens of a budget count: give tokens (--tokens N) too",
        ),
        (["--fraction", "1.5"], "'export.fraction' = 1.5"),
        (["--max-per-source", "sum=3"], "source 'sum': no source of the pool has that name; did you mean 'sums'?"),
        (["--k", "4", "--repeats", "3"], "a repeats file of 3 rows cannot hold the 4 chosen ones"),
        (["--k", "4", "--strategies", "lesss"], "strategy 'lesss' is not among those that chose; did you mean 'less'?"),
        (["--k", "4", "--pursuit.alpha", "0.9"], "an export needs 'selection', which is not complete for this config"),
    ],
)
def test_what_cannot_be_met_is_one_message(
    exported: Job, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    before = sorted((exported.run_dir / "exports").rglob("*"))
    assert words in refused(exported, capsys, *flags)
    assert sorted((exported.run_dir / "exports").rglob("*")) == before


@pytest.mark.parametrize("name", ["selected.jsonl", "selected.parquet", "repeated.jsonl"])
def test_trl_trains_on_every_file(exported: Job, tiny_path: Path, tmp_path: Path, name: str) -> None:
    path = exported.run_dir / "selection" / "gtp" / name
    kind = "parquet" if name.endswith("parquet") else "json"
    rows = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    config = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no", disable_tqdm=True, max_length=64,
    )  # fmt: skip
    trainer = SFTTrainer(str(tiny_path), config, train_dataset=rows)
    assert len(trainer.train_dataset) == len(rows)  # type: ignore[arg-type]
    assert trainer.train().training_loss > 0
