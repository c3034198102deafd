"""A damaged file of a run is found by `verify`, and nothing uses it in silence."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gradpursuit.cli import main
from gradpursuit.errors import DamagedError
from gradpursuit.file_check import check_files
from gradpursuit.manifest import Manifest
from gradpursuit.sealed import is_sealed_text, read_sealed, sealed_text, write_sealed
from jobs import Job

UNSEEN = ("log.txt", ".lock")


@pytest.fixture(scope="module")
def whole(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an export of a smaller budget and an added target."""
    job = Job(tmp_path_factory.mktemp("integrity"), tiny_path)
    job.save(evaluation={"seeds": 1, "budgets": [3]})
    job.write("other.jsonl", [job.row(i, "minus") for i in range(6)])
    for words in (
        ["run", str(job.path)],
        ["target", "add", str(job.run_dir), "--name", "other", "--file", str(job.folder / "other.jsonl")],
        ["export", str(job.run_dir), "--k", "3"],
        ["report", str(job.run_dir)],
    ):
        assert main([*words, "--quiet"]) == 0
    return job.run_dir


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and everything that a command says; never a traceback."""
    capsys.readouterr()
    code = main(words)
    told = "".join(capsys.readouterr())
    assert "Traceback" not in told
    return code, told


def files_of(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_file() and path.name not in UNSEEN)


def test_a_whole_run_is_whole_and_nothing_in_it_is_unexpected(run: Path) -> None:
    found = check_files(run)
    assert (found.problems, found.unexpected) == ([], [])
    names = {path.relative_to(run).parts[0] for path in files_of(run)}
    assert {"exports", "targets", "evaluation", "selection", "gradients", "trajectory", "data"} <= names


def kinds_of(run: Path, seed: int) -> list[Path]:
    """One file of every name, drawn by the seed."""
    found: dict[str, list[Path]] = {}
    for path in files_of(run):
        found.setdefault(path.name, []).append(path)
    draw = random.Random(seed)
    return [draw.choice(paths) for paths in found.values() if any(path.stat().st_size for path in paths)]


def test_a_flipped_bit_in_any_file_is_found(run: Path) -> None:
    draw, flips = random.Random(0), 0
    for path in kinds_of(run, 0):
        content = path.read_bytes()
        if not content:
            continue
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        assert [line for line in check_files(run).problems if str(path) in line], path
        path.write_bytes(content)
        flips += 1
    assert flips >= 30
    assert check_files(run).problems == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"\n"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to(path)),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_bytes(b"\xff\xfe{}"),
    ],
    ids=["deleted", "emptied", "appended", "cut", "folder", "loop", "pipe", "deep", "garbage"],
)
def test_every_kind_of_damage_is_found(
    run: Path, damage: Callable[[Path], object], request: pytest.FixtureRequest
) -> None:
    draw = random.Random(request.node.callspec.id)
    for path in draw.sample(kinds_of(run, 1), 8):
        content = path.read_bytes()
        if content:
            damage(path)
            assert [line for line in check_files(run).problems if str(path) in line], path
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    assert check_files(run).problems == []


def test_two_files_that_changed_places_are_found(run: Path) -> None:
    def swapped(first: Path, second: Path) -> list[str]:
        other = first.with_name("other")
        for a, b in ((first, other), (second, first), (other, second)):
            a.rename(b)
        return check_files(run).problems

    store = run / "gradients/pool/adam-symmetric"
    for first, second in (
        (store / "checkpoint-1/shard-00000.safetensors", store / "checkpoint-2/shard-00000.safetensors"),
        (store / "checkpoint-1/shard-00000.safetensors", store / "checkpoint-1/shard-00001.safetensors"),
        (run / "trajectory/checkpoint-1/state.json", run / "trajectory/checkpoint-2/state.json"),
        (run / "data/target.parquet", run / "data/heldout.parquet"),
        (run / "exports/k-3/gtp/selected.jsonl", run / "exports/k-3/less/selected.jsonl"),
    ):
        problems = swapped(first, second)
        assert all(any(str(path) in line for line in problems) for path in (first, second)), first
        assert swapped(first, second) == []


def test_status_names_a_file_of_another_size(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "data" / "pool.parquet"
    path.write_bytes(path.read_bytes()[:-5])
    assert f"data: {path}: not what 'data' wrote" in said(["status", str(run)], capsys)[1]


def test_files_of_the_user_are_no_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [run / "notes.txt", run / "exports" / "mine.txt", run / "gradients/pool/adam-symmetric/checkpoint-1/note"]
    own += [run / "evaluation" / "mine.md", run / "targets" / "readme.md"]
    for path in own:
        path.write_text("mine")
    assert check_files(run).problems == []
    assert check_files(run).unexpected == sorted(map(str, own))
    code, told = said(["verify", str(run), "--sample", "0"], capsys)
    assert code == 0
    assert f"{own[0]}: this run did not write it" in told


def test_a_changed_letter_of_the_manifest_is_refused_by_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = run / "manifest.json"
    text = manifest.read_text()
    for old, new in (
        ('"outputs"', '"outputz"'),
        ('"k": 5', '"k": 6'),
        ('"state": "complete"', '"state": "complete" '),
        ('"format": 2', '"format": 3'),
        ('"sha256"', '"sha257"'),
        ('"seed"', '"seeD"'),
    ):
        assert old in text
        manifest.write_text(text.replace(old, new, 1))
        for verb in ("status", "report", "select", "verify"):
            code, told = said([verb, str(run)], capsys)
            assert code == 2
            assert f"{manifest}: damaged: its contents do not match the checksum in it" in told
            assert f"gradpursuit run {run / 'config.yaml'} --run-dir {run}-again" in told


def test_a_changed_configuration_is_refused_by_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("k: 5", "k: 4", 1))
    for verb in ("status", "report", "select", "export"):
        code, told = said([verb, str(run)], capsys)
        assert (code, f"{config}: damaged: it is not what the run wrote" in told) == (2, True)
        assert f"gradpursuit run COPY.yaml --run-dir {run}" in told
    assert said(["verify", str(run), "--sample", "0"], capsys)[1].count(f"{config}: ") == 1
    copy = run.parent / "copy.yaml"
    shutil.copy(config, copy)
    assert main(["run", str(copy), "--run-dir", str(run), "--selection.k", "5", "--quiet"]) == 0
    assert is_sealed_text(config)
    assert said(["verify", str(run), "--sample", "0"], capsys)[0] == 0


@pytest.mark.parametrize(
    "name",
    [
        "evaluation/summary.json",
        "evaluation/differences.csv",
        "selection/gtp/selection.parquet",
        "selection/gtp/path.json",
        "data/dropped.jsonl",
        "data/pool.parquet",
        "trajectory/checkpoint-1/state.json",
        "gradients/pool/adam-symmetric/manifest.json",
        "gradients/target/adam-symmetric/checkpoint-1/shard-00000.safetensors",
    ],
)
def test_a_report_refuses_a_damaged_file(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = run / name, (run / "report.json").read_bytes()
    content = bytearray(path.read_bytes() or b"x")
    content[len(content) // 2] ^= 1
    stamp = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the same size and time
    code, told = said(["report", str(run)], capsys)
    assert (code, str(path) in told) == (2, True)
    assert "not complete for this configuration" not in told
    assert (run / "report.json").read_bytes() == page


def test_a_stage_names_the_damaged_file_it_needs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, verb, again in (
        ("data/pool.parquet", "select", "warmup"),
        ("trajectory/checkpoint-2/moments.safetensors", "collect", "warmup"),
        ("gradients/pool/adam-symmetric/checkpoint-2/shard-00001.safetensors", "select", "collect"),
        ("selection/less/path.parquet", "export", "select"),
    ):
        path = run / name
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 2]) + content[-8:])
        code, told = said([verb, str(run)], capsys)
        assert code == 2
        assert f"{path}: " in told
        assert f"run `gradpursuit {again} {run}` first" in told
        assert "not complete" not in told
        path.write_bytes(content)


def test_a_comparison_makes_its_damaged_selections_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = run.glob("evaluation/selections/own/gtp-3-*/selection.parquet")
    content = path.read_bytes()
    path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    table = (run / "evaluation/differences.csv").read_bytes()
    (run / "evaluation/table.md").write_text("nothing")
    assert main(["compare", str(run), "--quiet"]) == 0
    assert path.read_bytes() == content
    assert (run / "evaluation/differences.csv").read_bytes() == table
    assert check_files(run).problems == []


def test_odd_state_files_give_one_message(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["manifest.json", "run.json", ".lock", "progress.json", "evaluation/plan.json", "evaluation/results.jsonl"]
    names += ["trajectory/checkpoint-1/state.json", "targets/other/manifest.json", "exports/k-3/export.json"]
    names += ["selection/gtp/checksums.json", "selection/gtp/path.json", "gradients/pool/adam-symmetric/manifest.json"]
    odd = ("", "{", "[" * 50_000, "null", "3", '{"format": [], "stages": 7}', '{"pid": "x", "since": 4}', "\x00")
    draw = random.Random(1)
    for name in names:
        path = run / name
        kept = path.read_bytes() if path.is_file() else None
        for text in draw.sample(odd, 2):
            path.write_text(text)
            for verb in ("status", "report"):
                code, told = said([verb, str(run), "--quiet"], capsys)
                assert code in (0, 2)
                assert (code == 0) or str(path) in told, (name, text, told)
            if kept is not None and name not in UNSEEN:
                assert [line for line in check_files(run).problems if str(path) in line], (name, text)
        path.unlink(missing_ok=True) if kept is None else path.write_bytes(kept)


def test_a_damaged_target_is_made_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "targets/other/manifest.json"
    path.write_text(path.read_text().replace("rows", "r0ws"))
    code, told = said(["select", str(run), "--selection.target", "other"], capsys)
    assert (code, f"{path}: damaged" in told) == (2, True)
    other = str(run.parent / "other.jsonl")
    Path(other).write_text("".join(json.dumps(Job.row(i, "minus")) + "\n" for i in range(6)))
    again = ["target", "add", str(run), "--name", "other", "--file", other]
    assert f"gradpursuit target add {run} --name other --file FILE.jsonl --replace" in told
    assert main([*again, "--quiet"]) == 2
    assert main([*again, "--replace", "--quiet"]) == 0
    assert check_files(run).problems == []


def test_an_older_copy_of_the_settings_is_found(run: Path) -> None:
    before = (run / "config.yaml").read_bytes()
    assert main(["select", str(run), "--selection.k", "4", "--quiet"]) == 0
    (run / "config.yaml").write_bytes(before)
    assert [line for line in check_files(run).problems if "not the settings that the last stage ran with" in line]


def test_sealed_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed(path, {"a": 1e-07, "b": ["é", None]})
    assert read_sealed(path) == {"a": 1e-07, "b": ["é", None]}
    text = path.read_text()
    for changed in (text.replace("e-07", "E-07"), text.replace(": 1", ":  1"), text[:-1], text + " "):
        path.write_text(changed)
        with pytest.raises(DamagedError, match="do not match the checksum"):
            read_sealed(path)
    (tmp_path / "c.yaml").write_text(sealed_text("a: 1\n"))
    assert is_sealed_text(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(sealed_text("a: 1\n").replace("a: 1", "a: 2"))
    assert not is_sealed_text(tmp_path / "c.yaml")
    assert Manifest(tmp_path / "none").read()["stages"] == {}


@pytest.mark.parametrize("name", ["../victim", "{}/victim", "evaluation/../../victim"])
def test_a_manifest_of_a_stranger_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    entry = {"state": "complete", "fingerprint": "", "outputs": {name.format(tmp_path): "00"}, "sizes": {}}
    write_sealed(tmp_path / "run" / "manifest.json", {"format": 2, "stages": {"evaluation": entry}})
    with pytest.raises(DamagedError, match="lies outside of its folder"):
        Manifest(tmp_path / "run").read()


def test_a_damaged_file_behind_a_link_is_not_deleted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = run.with_name("own")
    own.mkdir()
    (own / "table.md").write_text("mine")
    shutil.rmtree(run / "evaluation")
    (run / "evaluation").symlink_to(own)
    assert main(["compare", str(run), "--evaluation.seeds", "1"]) == 2
    assert "a link leads there: move it away" in capsys.readouterr().err
    assert (own / "table.md").read_text() == "mine"
