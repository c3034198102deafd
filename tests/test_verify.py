"""`gradpursuit verify`: what it says of a sound run, and of every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradpursuit.cli import main
from gradpursuit.manifest import Manifest
from gradpursuit.opening import read_config
from gradpursuit.pipeline import Run
from gradpursuit.sealed import write_sealed
from gradpursuit.store import GradientStore
from gradpursuit.verify import verify
from jobs import Job


@pytest.fixture(scope="module")
def collected(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every stage is complete."""
    job = Job(tmp_path_factory.mktemp("verify"), tiny_path)
    job.save(evaluation={"seeds": 1})
    assert main(["run", str(job.path)]) == 0
    return job.run_dir


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def run_of(folder: Path) -> Run:
    return Run(read_config(folder / "config.yaml", []))


def test_a_sound_run(collected: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(collected)
    assert main(["verify", str(collected), "--sample", "5"]) == 0
    out = capsys.readouterr().out
    assert "every file is what was written, no row is missing" in out
    assert "pool/adam-symmetric" in out
    assert snapshot(collected) == before


def test_rows_come_out_the_same_one_by_one(collected: Path) -> None:
    found = verify(run_of(collected), sample=40)
    assert found.problems == []
    stores = {check.store: check for check in found.checks}
    assert set(stores) == {f"pool/{n}" for n in ("adam-symmetric", "adam-uncorrected")} | {
        f"target/{n}" for n in ("adam-symmetric", "identity")
    }
    assert stores["pool/adam-symmetric"].rows == 31
    assert stores["target/identity"].rows == 6
    assert all(check.worst.lost < 1e-6 for check in found.checks)


@pytest.fixture
def damaged(collected: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(collected, folder)
    return folder


def problems(folder: Path) -> list[str]:
    return verify(run_of(folder), sample=2).problems


def test_a_changed_output_is_named(damaged: Path) -> None:
    path = damaged / "selection" / "gtp" / "selected.jsonl"
    path.write_bytes(path.read_bytes().replace(b"plus", b"pius", 1))
    assert [p for p in problems(damaged) if str(path) in p and "gradpursuit export" in p]


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_shard_is_named_with_its_rows(damaged: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = damaged / "gradients" / "pool" / "adam-symmetric" / "checkpoint-2" / "shard-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    {"flip": lambda: path.write_bytes(content), "cut": lambda: path.write_bytes(content[:-30]), "delete": path.unlink}[
        damage
    ]()
    found = problems(damaged)
    assert len(found) == 1
    assert str(path) in found[0]
    assert f"rows 8-15 of checkpoint 2 are missing; run `gradpursuit collect {damaged}`" in found[0]
    assert main(["verify", str(damaged)]) == 2
    assert "1 problem in" in capsys.readouterr().err


def test_features_that_are_not_those_of_the_row_are_found(damaged: Path) -> None:
    """A shard that is whole and fits, but holds what another program computed."""
    store = GradientStore.open(damaged / "gradients" / "target" / "identity")
    shard = store.read(0, 0)
    rng = np.random.default_rng(0)
    store.write(0, 0, _with(shard, rng.normal(size=shard.features.shape).astype(np.float32)))
    found = verify(run_of(damaged), sample=40)
    assert [p for p in found.problems if "target/identity" in p and "comes out differently" in p]


def _with(shard: Any, features: np.ndarray) -> Any:
    from dataclasses import replace

    return replace(shard, features=features)


def test_an_unfinished_stage_is_told(damaged: Path) -> None:
    manifest = Manifest(damaged).read()
    del manifest["stages"]["report"]
    write_sealed(damaged / "manifest.json", manifest)
    assert [p for p in problems(damaged) if "stage 'report' is new" in p and "gradpursuit report" in p]


def test_what_is_outdated_is_no_problem(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def states() -> dict[str, str]:
        capsys.readouterr()
        assert main(["status", str(damaged), "--json"]) == 0
        stages = json.loads(capsys.readouterr().out)["stages"]
        return {stage["stage"]: stage["state"] for stage in stages if stage["state"] != "complete"}

    strategies = "--selection.strategies"
    for words in (["select", strategies, "gtp"], ["report"]):
        assert main([words[0], str(damaged), *words[1:], "--quiet"]) == 0
    assert states() == {"export": "outdated", "evaluation": "outdated"}, "the report is of the run as it is"
    assert main(["verify", str(damaged), "--sample", "0"]) == 0
    out = capsys.readouterr().out
    assert f"stage 'export' is outdated; run `gradpursuit export {damaged}`" in out
    assert "what is outdated apart, every file is what was written" in out
    assert main(["select", str(damaged), strategies, "[gtp, less, random]", "--quiet"]) == 0
    assert states() == {"export": "outdated", "report": "outdated"}, "their files are gone, or of another selection"
    assert main(["export", str(damaged), "--quiet"]) == 0
    found = verify(run_of(damaged), sample=0)
    assert (found.problems, len(found.outdated)) == ([], 1)
    assert f"stage 'report' is outdated; run `gradpursuit report {damaged}`" in found.outdated[0]
    assert main(["report", str(damaged), "--quiet"]) == 0
    assert states() == {}
    assert main(["compare", str(damaged), "--quiet"]) == 0
    assert states() == {}


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err


def test_every_problem_is_told_and_only_what_is_sound_is_computed_again(damaged: Path) -> None:
    (damaged / "trajectory" / "checkpoint-2" / "moments.safetensors").unlink()
    (damaged / "selection" / "gtp" / "selected.jsonl").unlink()
    found = verify(run_of(damaged), sample=2)
    assert [p for p in found.problems if "moments.safetensors" in p and "gradpursuit warmup" in p]
    assert [p for p in found.problems if "selected.jsonl" in p]
    assert found.checks == []


def test_many_damaged_shards_are_told_in_few_lines(damaged: Path) -> None:
    for path in (damaged / "gradients" / "pool" / "adam-symmetric").glob("checkpoint-*/*.safetensors"):
        path.unlink()
    found = [p for p in problems(damaged) if "adam-symmetric" in p]
    assert len(found) == 6
    assert "and 3 more shards like these; run `gradpursuit collect" in found[-1]


def test_added_targets_are_verified_as_well(damaged: Path) -> None:
    other = damaged.parent / "other.jsonl"
    other.write_text("".join(json.dumps(Job.row(i, "minus")) + "\n" for i in range(5)))
    assert main(["target", "add", str(damaged), "--name", "other", "--file", str(other)]) == 0
    found = verify(run_of(damaged), sample=2)
    assert found.problems == []
    assert {check.store for check in found.checks} >= {"targets/other/target/identity"}
    heldout = damaged / "targets" / "other" / "data" / "heldout.parquet"
    heldout.write_bytes(heldout.read_bytes()[:-1])
    assert [p for p in problems(damaged) if "not what 'data' of target 'other' wrote" in p and "heldout.parquet" in p]


def test_sample_sizes(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(damaged), "--sample", "0"]) == 0
    assert "computed again" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["verify", str(damaged), "--sample", "-3"])
    assert "'-3' is not a whole number from 0" in capsys.readouterr().err
