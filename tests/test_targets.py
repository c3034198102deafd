from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradpursuit.cli import main
from gradpursuit.config import load_config
from gradpursuit.files import sha256_of
from gradpursuit.pipeline import Run
from gradpursuit.progress import Progress
from gradpursuit.store import GradientStore
from gradpursuit.targets import targets
from jobs import Job


def other_rows(start: int) -> list[dict[str, Any]]:
    return [Job.row(i, "minus") for i in range(start, start + 5)]


@pytest.fixture(scope="module")
def template(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run whose gradients are collected, and files of other targets beside it."""
    job = Job(tmp_path_factory.mktemp("template"), tiny_path)
    job.write("other.jsonl", other_rows(0))
    job.write("more.jsonl", other_rows(5))
    job.write("score.jsonl", other_rows(20))
    assert main(["warmup", str(job.path)]) == 0
    trained = next(name for name in trained_on(job.run_dir) if name not in ("plus-3", "copy-of-3"))
    job.write("leaky.jsonl", [*other_rows(0), job.row(3), job.row(int(trained.removeprefix("plus-")))])
    assert main(["collect", str(job.run_dir)]) == 0
    return job


@pytest.fixture
def run(template: Job, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template.run_dir, tmp_path / "run"))


def trained_on(run: Path) -> list[str]:
    ids: list[str] = json.loads((run / "trajectory/slice.json").read_text())["ids"]
    return ids


def add(
    run: Path, template: Job, *names: str, name: str = "other", heldout: str = "", flags: tuple[str, ...] = ()
) -> int:
    arguments = ["target", "add", str(run), "--name", name, *flags]
    for file in names:
        arguments += ["--file", str(template.folder / file)]
    if heldout:
        arguments += ["--heldout", str(template.folder / heldout)]
    return main(arguments)


def contents(*folders: Path) -> dict[Path, tuple[str, int]]:
    """sha256 and time of change of every file."""
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (sha256_of(path), path.stat().st_mtime_ns) for path in found}


def features(folder: Path) -> dict[str, list[np.ndarray]]:
    return {
        path.name: [np.concatenate(shards) for shards in GradientStore.open(path).features()]
        for path in sorted(folder.iterdir())
    }


def chosen(run: Path, name: str = "gtp") -> list[str]:
    return [json.loads(line)["id"] for line in (run / f"selection/{name}/selected.jsonl").read_text().splitlines()]


def test_features_are_those_of_a_fresh_run_and_nothing_else_is_touched(
    run: Path, template: Job, tmp_path: Path, tiny_path: Path
) -> None:
    parts = [run / name for name in ("data", "trajectory", "gradients")]
    before = contents(*parts)
    assert add(run, template, "other.jsonl", "more.jsonl", heldout="score.jsonl") == 0
    assert contents(*parts) == before
    assert {path.name for path in (run / "targets" / "other").iterdir()} == {"manifest.json", "data", "gradients"}

    fresh = Job(tmp_path, tiny_path)
    files = [str(template.folder / name) for name in ("other.jsonl", "more.jsonl")]
    fresh.save(run_dir=str(tmp_path / "fresh"), data={"target": files, "heldout": str(template.folder / "score.jsonl")})
    assert main(["run", str(fresh.path)]) == 0
    mine = features(run / "targets/other/gradients/target")
    wanted = features(tmp_path / "fresh/gradients/target")
    assert list(mine) == list(wanted) == ["adam-symmetric", "identity"]
    for label, arrays in mine.items():
        for ours, theirs in zip(arrays, wanted[label], strict=True):
            assert ours.dtype == np.float32
            assert np.array_equal(ours, theirs)

    for verb in ("select", "export", "compare"):
        assert main([verb, str(run), "--selection.target", "other"]) == 0
    for name in ("gtp", "less", "random"):
        assert chosen(run, name) == chosen(tmp_path / "fresh", name)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run, tmp_path / "fresh")]
    for name, report in zip(("other", "own"), reports, strict=True):
        table = report["comparison"]
        for part in (table, *table["rows"], *table["differences"]):
            assert part.pop("target") == name
    assert reports[0]["comparison"] == reports[1]["comparison"]
    assert [report["cleaning"]["rows"]["target"] for report in reports] == [10, 10]
    assert [report["cleaning"]["rows"]["heldout"] for report in reports] == [5, 5]
    assert "chosen for “other” by gtp" in (run / "report.html").read_text("utf-8")
    assert contents(*parts) == before


def test_a_target_is_chosen_for_until_another_is_named(run: Path, template: Job) -> None:
    assert main(["run", str(run / "config.yaml"), "--selection.strategies", "[gtp]"]) == 0
    own = chosen(run)
    assert add(run, template, "other.jsonl") == 0
    assert main(["run", str(run / "config.yaml"), "--selection.target", "other"]) == 0
    other = chosen(run)
    assert main(["export", str(run)]) == 0, "config.yaml remembers the target"
    assert chosen(run) == other
    assert main(["select", str(run), "--selection.target", "null"]) == 0
    assert main(["export", str(run)]) == 0
    assert chosen(run) == own


def test_the_same_again_is_complete_and_other_content_is_refused(
    run: Path, template: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run / "targets/other"
    assert add(run, template, "other.jsonl") == 0
    assert main(["select", str(run), "--selection.target", "other"]) == 0
    before = contents(folder)
    capsys.readouterr()
    assert add(run, template, "other.jsonl") == 0
    assert capsys.readouterr().err.count("complete, nothing to do") == 2
    assert contents(folder) == before
    for files, heldout in ((("more.jsonl",), ""), (("other.jsonl",), "score.jsonl")):
        assert add(run, template, *files, heldout=heldout) == 2
        message = capsys.readouterr().err
        assert f"target 'other' is there with other content ({template.folder / 'other.jsonl'})" in message
        assert "choose another name, or give --replace" in message
    assert contents(folder) == before
    assert add(run, template, "more.jsonl", flags=("--replace",)) == 0
    for line in capsys.readouterr().err.splitlines():
        assert not re.search("[0-9a-f]{12}", line), "a sha256 tells a person nothing"
    assert {path for path, stamp in contents(folder).items() if before.get(path) == stamp} == set()
    assert main(["export", str(run)]) == 2, "the selection was for the other content"
    assert "needs 'selection'" in capsys.readouterr().err
    assert main(["target", "list", str(run)]) == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line == ["other", "complete", "3", "2", "0", str(template.folder / "more.jsonl")]


@pytest.fixture
def elsewhere(template: Job, tmp_path: Path) -> Iterator[list[str]]:
    """The input files of the run are gone for a while; their names."""
    names = [str(template.folder / f"{name}.jsonl") for name in ("pool", "target", "heldout")]
    kept = {path: Path(path).read_bytes() for path in names}
    for path in names:
        Path(path).unlink()
    yield names
    for path, content in kept.items():
        Path(path).write_bytes(content)


def test_a_finished_run_needs_its_input_files_no_more(
    run: Path, template: Job, elsewhere: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = f"note: not there any more: {', '.join(elsewhere)}; what was made of it is used"
    other = tmp_path / "other.jsonl"
    other.write_bytes((template.folder / "other.jsonl").read_bytes())
    words = ["--name", "other", "--file", str(other)]
    for verb in (
        ["target", "add", str(run), *words],
        ["select", str(run), "--selection.target", "other"],
        ["run", str(run / "config.yaml"), "--evaluation.seeds", "1", "--selection.strategies", "gtp,less,random"],
        ["verify", str(run), "--sample", "1"],
    ):
        capsys.readouterr()
        assert main(verb) == 0
        assert capsys.readouterr().err.count(note) == 1
    assert main(["status", str(run)]) == 0
    printed = capsys.readouterr()
    assert f"data: {note.removeprefix('note: ')}" in printed.out
    assert "note" not in printed.err
    assert "outdated" not in printed.out

    other.unlink()
    assert main(["target", "add", str(run), *words]) == 0
    assert f"note: not there any more: {other}; what was made of it is used" in capsys.readouterr().err
    assert main(["target", "add", str(run), "--name", "again", "--file", str(other)]) == 2
    assert "other.jsonl: no such file for the target" in capsys.readouterr().err

    data = contents(run / "data")
    assert main(["warmup", str(run), "--data.max_tokens", "500"]) == 2
    message = capsys.readouterr().err
    assert f"not there any more: {', '.join(elsewhere)}, but the data must be cleaned again: put it back" in message
    assert contents(run / "data") == data
    Path(elsewhere[0]).write_bytes(b'{"prompt": "a", "completion": "b"}\n')
    assert main(["select", str(run)]) == 2
    assert "'selection' needs 'data', which is not complete" in capsys.readouterr().err


def test_pool_rows_that_repeat_the_target_are_told_and_never_chosen(
    run: Path, template: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add(run, template, "leaky.jsonl", heldout="score.jsonl") == 0
    printed = capsys.readouterr().err
    assert "dropped 3 rows of pool: same content as a row of target or heldout; left out of selections" in printed
    leaky = [json.loads(line)["id"] for line in (template.folder / "leaky.jsonl").read_text().splitlines()]
    left_out = {*leaky[5:], "copy-of-3"}
    assert f"the warm-up trained on {len(left_out & set(trained_on(run)))} pool rows" in printed
    dropped = [json.loads(line) for line in (run / "targets/other/data/dropped.jsonl").read_text().splitlines()]
    assert {record["id"] for record in dropped} == left_out
    for_all = ["--selection.target", "other", "--selection.k", "28"]
    assert main(["select", str(run), *for_all]) == 0
    assert main(["export", str(run), *for_all]) == 0
    everything = {row["id"] for row in map(json.loads, (template.folder / "pool.jsonl").read_text().splitlines())}
    for name in ("gtp", "less", "random"):
        assert not left_out & set(chosen(run, name))
    assert set(chosen(run, "less")) == everything - left_out
    capsys.readouterr()
    assert main(["select", str(run), "--selection.target", "other", "--selection.k", "29"]) == 2
    assert "only 28 of the 31 examples of the pool can be chosen for target 'other'" in capsys.readouterr().err


def test_changed_settings_make_it_outdated_and_the_command_named_mends_it(
    run: Path, template: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add(run, template, "other.jsonl") == 0
    settings = ["--gradients.dim", "128", "--selection.target", "other"]
    capsys.readouterr()
    assert main(["collect", str(run), *settings]) == 0
    assert main(["select", str(run)]) == 2
    message = capsys.readouterr().err
    command = f"gradpursuit target add {run} --name other --file {template.folder / 'other.jsonl'}"
    assert f"target 'other' was made with other settings or another pool; run `{command}` first" in message
    assert main(["status", str(run)]) == 0
    assert "was made with other settings" in (printed := capsys.readouterr().out)
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("other ")] == ["outdated"]
    assert main(command.split()[1:]) == 0
    assert main(["select", str(run)]) == 0
    assert GradientStore.open(run / "targets/other/gradients/target/identity").spec.dim == 128


def test_other_strategies_need_only_the_features_that_are_lacking(
    run: Path, template: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    few, many = (["--selection.strategies", names] for names in ("gtp,random", "gtp,less"))
    assert main(["select", str(run), *few]) == 0
    assert add(run, template, "other.jsonl") == 0
    stores = run / "targets/other/gradients/target"
    assert [path.name for path in stores.iterdir()] == ["adam-symmetric"]
    before = contents(stores / "adam-symmetric")

    assert main(["select", str(run), *many]) == 0
    capsys.readouterr()
    assert main(["select", str(run), "--selection.target", "other"]) == 2
    command = f"gradpursuit target add {run} --name other --file {template.folder / 'other.jsonl'}"
    lacks = f"lacks features that the strategies need (identity); run `{command}`"
    assert f"target 'other' {lacks} first" in capsys.readouterr().err
    assert main(["verify", str(run), "--sample", "0"]) == 2
    assert f"target 'other' {lacks}" in capsys.readouterr().err
    for verb in ("status", "target list"):
        assert main([*verb.split(), str(run)]) == 0
        printed = capsys.readouterr().out
        assert f"other: {lacks}" in printed
        assert "unfinished" in printed

    assert main(["select", str(run), *few, "--selection.target", "other"]) == 0, "it has what these need"
    assert main(["select", str(run), *many, "--selection.target", "null"]) == 0
    assert main(command.split()[1:]) == 0
    assert contents(stores / "adam-symmetric") == before
    assert main(["select", str(run), "--selection.target", "other"]) == 0
    assert main(["collect", str(run), *few]) == 0
    assert main(["select", str(run), "--gradients.preconditioner", "identity"]) == 2, "the run's own are others now"
    assert main(["collect", str(run), "--gradients.preconditioner", "identity"]) == 0
    assert main(["select", str(run)]) == 0, "identity was collected for another strategy"
    assert main(["collect", str(run), "--selection.strategies", "gtp,rds", "--gradients.preconditioner", "adam"]) == 0
    capsys.readouterr()
    assert main(["status", str(run)]) == 0
    assert "lacks features that the strategies need (embedding)" in capsys.readouterr().out
    assert main(command.split()[1:]) == 0
    assert main(["select", str(run)]) == 0
    (target,) = list(targets(Run(load_config(run / "config.yaml", [f"run_dir={run}"]))))
    assert sorted(target.features) == ["adam-symmetric", "embedding", "identity"]


def test_a_broken_or_unfinished_target_is_named_and_mended(
    run: Path, template: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gradpursuit.targets._collect", interrupted)
        assert add(run, template, "other.jsonl") == 130
    assert main(["select", str(run), "--selection.target", "other"]) == 2
    assert "target 'other' was not finished; run `gradpursuit target add" in capsys.readouterr().err
    assert add(run, template, "other.jsonl") == 0
    shard = run / "targets/other/gradients/target/identity/checkpoint-1/shard-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-3] + b"abc")
    assert main(["select", str(run), "--selection.target", "other"]) == 2
    assert "has a file that is missing or was changed" in capsys.readouterr().err
    kept = contents(run / "targets/other/data")
    assert add(run, template, "other.jsonl") == 0
    assert shard.read_bytes() == content
    assert contents(run / "targets/other/data") == kept


def test_mistakes_leave_nothing_behind(run: Path, template: Job, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(words: str, *files: str, **options: Any) -> None:
        capsys.readouterr()
        assert add(run, template, *files, **options) == 2
        message = capsys.readouterr().err
        assert words in message[message.index("error: ") :]
        assert not (run / "targets").exists() or not list((run / "targets").iterdir())

    (template.folder / "empty.jsonl").write_text("")
    refused("empty.jsonl: holds no examples", "empty.jsonl")
    refused("none.jsonl: no such file for the target", "none.jsonl")
    refused("every row of the target is also in heldout", "other.jsonl", heldout="other.jsonl")
    refused("every row of the pool is also in target or heldout", "pool.jsonl", heldout="score.jsonl")
    for name in ("../up", "a/b", ".hidden", "", "true", "5", "null", "x" * 65):
        refused("the name of a target is a letter followed by", "other.jsonl", name=name)
    for name in ("own", "pool"):
        refused(f"'{name}' is what the run's own", "other.jsonl", name=name)
    assert main(["select", str(run), "--selection.target", "../up"]) == 2
    assert "--selection.target: 'selection.target' = '../up': the name of a target" in capsys.readouterr().err
    assert main(["select", str(run), "--selection.target", "nobody"]) == 2
    assert "target 'nobody': the run has no such target (added: none); run `" in capsys.readouterr().err
    assert main(["target", "list", str(run)]) == 0
    assert "no target was added" in capsys.readouterr().out


def test_it_needs_the_gradients_of_the_run(run: Path, template: Job, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "gradients/pool/adam-symmetric/checkpoint-1/shard-00002.safetensors").unlink()
    assert add(run, template, "other.jsonl") == 2
    message = capsys.readouterr().err
    assert "shard-00002.safetensors: not there: rows 16-23 of checkpoint 1 are missing" in message
    assert f"run `gradpursuit collect {run}` first" in message
    assert not (run / "targets").exists()


def test_leaving_rows_out_costs_no_copy_of_the_features(run: Path) -> None:
    from gradpursuit.features import TrajectoryFeatures

    found = TrajectoryFeatures(GradientStore.open(run / "gradients/pool/adam-symmetric").features())
    rows = np.array([0, 1, 2, 5, 8, 9, 17, 30])
    taken = found.take(rows)
    for t in range(2):
        assert np.array_equal(taken.at(t), found.at(t)[rows])
        shards = [found.blocks[t][i] for i in (0, 0, 1, 2, 3)]
        assert all(
            np.shares_memory(part.values, shard.values) for part, shard in zip(taken.blocks[t], shards, strict=True)
        )
    assert [len(shard) for shard in found.take(np.arange(31)).blocks[0]] == [8, 8, 8, 7]


def test_a_run_elsewhere_has_targets_of_its_own(run: Path, template: Job) -> None:
    assert add(run, template, "other.jsonl") == 0
    made = Run(load_config(run / "config.yaml", [f"run_dir={run}", "selection.target=other"]))
    assert made.target_folder == run / "targets/other"
    assert len(made.target_table("target")) == 3
    assert len(made.table("target")) == 6
    assert made.candidates().tolist() == list(range(31))


def test_a_target_at_work_is_shown(run: Path, template: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(run, template, "other.jsonl") == 0
    capsys.readouterr()
    made = Run(load_config(run / "config.yaml", [f"run_dir={run}"]))
    with made.working("target other"), Progress("gradients of the target", 6) as progress:
        progress.update(2)
        assert main(["status", str(run), "--json"]) == 0
        (target,) = json.loads(capsys.readouterr().out)["targets"]
        assert (target["state"], target["now"]["what"], target["now"]["total"]) == (
            "running",
            "gradients of the target",
            6,
        )
        assert main(["status", str(run)]) == 0
        assert "now: gradients of the target: 0/6 rows" in capsys.readouterr().out


def test_a_replacement_that_fails_leaves_the_old_target(run: Path, template: Job, tmp_path: Path) -> None:
    assert add(run, template, "other.jsonl") == 0
    folder = run / "targets" / "other"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "only a prompt"}\n')
    assert main(["target", "add", str(run), "--name", "other", "--file", str(bad), "--replace"]) == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in run.rglob(".*.gradpursuit-*")) == []
