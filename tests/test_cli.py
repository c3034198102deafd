from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradpursuit import __version__
from gradpursuit.cli import main
from gradpursuit.files import sha256_of
from gradpursuit.manifest import Manifest
from gradpursuit.marker import run_id
from gradpursuit.sealed import sealed_text, write_sealed
from jobs import Job


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a refused command."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as exit_:  # argparse's own way out
        code = exit_.code  # type: ignore[assignment]
    printed = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in printed.err + printed.out
    message = printed.err[printed.err.index("error: ") :]
    assert message.count("error: ") == 1
    return message.removeprefix("error: ").strip()


def test_help_and_import_load_nothing_heavy() -> None:
    code = (
        "import sys, gradpursuit, gradpursuit.cli\n"
        "try: gradpursuit.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'pydantic', 'rich', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


def test_the_module_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gradpursuit", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"gradpursuit {__version__}")


def test_version_and_lazy_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out
    import gradpursuit

    assert gradpursuit.GradientTrajectoryPursuit.__name__ == "GradientTrajectoryPursuit"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gradpursuit.nothing


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        (["warmup", "nowhere"], "nowhere: no such run folder; `gradpursuit warmup CONFIG.yaml` begins one"),
        (["ruin"], "invalid choice: 'ruin'"),
        ([], "required: VERB"),
        (["run", "x.yaml", "--selection.k"], "'--selection.k' has no value"),
        (["run", "x.yaml", "--colour"], "unrecognized arguments: --colour; `gradpursuit VERB --help` lists the flags"),
        (["quickstart", "--selection.kk", "3"], "unknown key 'kk' in section 'selection'; did you mean 'k'?"),
        (["quickstart", "--selection.strategies", "[gtp, lest]"], "unknown strategy 'lest'; did you mean 'less'?"),
        (["quickstart", "--warmup.fraction", "2"], "--warmup.fraction: 'warmup.fraction' = 2"),
        (["target"], "required: add|list"),
        (["target", "add", "x"], "required: --name, --file"),
        (["target", "list", "nowhere"], "nowhere: no such folder"),
        (["quickstart", "--run-dir", "s3://bucket/run"], "run_dir 's3://bucket/run': a run folder lies on a disk"),
        (["quickstart", "--run-dir", "/"], "run_dir '/': the root of a file system is no run folder; name a folder in"),
    ],
)
def test_wrong_commands(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in fails(arguments, capsys)


def test_wrong_configurations(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["run", str(job.path)]
    for setting, words in (
        (["--pursuit.alpa", "1"], "unknown key 'alpa' in section 'pursuit'; did you mean 'alpha'?"),
        (["--selektion.k", "1"], "unknown key 'selektion'; did you mean 'selection'?"),
        (["--selection.fraction", "0.5"], "k and fraction are both given"),
        (["--selection.strategies", "[gtpp]"], "unknown strategy 'gtpp'; did you mean 'gtp'?"),
        (["--gradients.preconditioner", "adamw"], "'gradients.preconditioner' = 'adamw'"),
        (["--selection.k", "1000"], "selection.k = 1000, but the cleaned pool has only 31 examples"),
        (["--model.path", "./none"], "model.path './none': no such folder"),
        (["--model.path", "./none.gguf"], "no such GGUF file"),
        (["--model.device", "warp9"], "model.device 'warp9' cannot be used here"),
        (["--model.lora.target_modules", "nothing_like_it"], "target_modules='nothing_like_it'"),
        (["--warmup.checkpoints", "500"], "raise warmup.fraction or warmup.epochs"),
        (["--evaluation.targets", "own,law"], "evaluation.targets: 'law' was not added to this run, and can be when"),
        (["--selection.target", "law"], "selection.target: 'law' was not added to this run, and can be when"),
        (["--data.max_tokens", "9"], "6 of 6 rows of the target cannot be used (6 × longer than max_tokens"),
    ):
        assert words in fails([*run, *setting], capsys)
    assert not (job.run_dir / "selection").exists()
    assert not list(job.run_dir.rglob("*.part"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("pool", None, "pool.jsonl: no such file for the pool; correct the path: a relative one goes from the folder"),
        ("pool", '{"prompt": "a", "completion": "b"}\n{"prompt": \n', "the cleaned pool has only 1 examples"),
        ("pool", '{"question": "a", "answer": "b"}\n', "pool.jsonl:1: columns found: 'question', 'answer'; expected"),
        ("pool", '{"prompt": "a", "completion": "b", "rank": 1}\n', "pool.jsonl:1: the column 'rank'"),
        ("heldout", None, "heldout.jsonl: no such file for the heldout; correct the path"),
        ("target", "", "target.jsonl: holds no examples"),
        ("target", '["a"]\n', "target.jsonl:1: expected a JSON object, found list"),
        ("heldout", '{"messages": [{"role": "user", "content": "a"}]}\n', "1 × no supervised token"),
    ],
)
def test_wrong_files(job: Job, name: str, content: str | None, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = job.folder / f"{name}.jsonl"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert words in fails(["run", str(job.path)], capsys)
    assert not (job.run_dir / "trajectory").exists()


def test_a_pool_that_leaks_the_target_is_cleaned_and_told(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.write("pool.jsonl", [job.row(i) for i in range(8)] + [job.row(2, "times"), job.row(7, "times")])
    assert main(["warmup", str(job.path)]) == 0
    assert "dropped 2 rows of pool: same content as a row of target or heldout" in capsys.readouterr().err
    dropped = [json.loads(line) for line in (job.run_dir / "data/dropped.jsonl").read_text().splitlines()]
    assert [(record["id"], record["line"]) for record in dropped] == [("times-2", 9), ("times-7", 10)]


def test_a_checkpoint_whose_optimizer_does_not_fit(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    assert main(["warmup", str(job.path)]) == 0
    path = job.run_dir / "trajectory/checkpoint-2/moments.safetensors"
    moments = load_file(path)
    name = sorted(moments)[0]
    save_file({**moments, name: moments[name][:-1].contiguous()}, path)
    message = fails(["collect", str(job.run_dir)], capsys)
    assert f"{path}: not what 'trajectory' wrote; 'gradients' needs it: put it back" in message
    assert f"or run `gradpursuit warmup {job.run_dir}` first" in message
    manifest = Manifest(job.run_dir).read()
    outputs = manifest["stages"]["trajectory"]["outputs"]
    outputs["trajectory/checkpoint-2/moments.safetensors"] = sha256_of(path)  # as if the run had come with it
    write_sealed(job.run_dir / "manifest.json", manifest)
    message = fails(["collect", str(job.run_dir)], capsys)
    assert "moments.safetensors" in message
    assert name.removeprefix("m.") in message
    assert "has shape" in message


def test_a_full_disk_is_told_before_the_gradients(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["warmup", str(job.path)]) == 0

    class Usage:
        free = 70 << 20

    monkeypatch.setattr("shutil.disk_usage", lambda _folder: Usage)
    for _ in range(2):  # before there are gradients, and when there are
        before = {path: path.read_bytes() for path in job.run_dir.rglob("*.*") if path.name != "log.txt"}
        message = fails(["collect", str(job.run_dir), "--gradients.dim", "500000"], capsys)
        assert "the gradient store needs" in message
        assert "70 MiB are free" in message
        assert {path: path.read_bytes() for path in job.run_dir.rglob("*.*") if path.name != "log.txt"} == before
        assert main(["collect", str(job.run_dir)]) == 0


def test_an_unwritable_run_folder(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    (job.folder / "file").write_text("")
    message = fails(["run", str(job.path), "--run-dir", str(job.folder / "file" / "run")], capsys)
    assert "cannot be written" in message


def test_every_verb_that_takes_a_configuration_takes_the_run_folder(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    other = job.folder / "other"
    for verb in ("warmup", "collect", "select"):
        assert main([verb, str(job.path), "--run-dir", str(other), "--selection.strategies", "random"]) == 0
    assert (other / "selection" / "random").is_dir()
    assert "--run_dir: 'run_dir' = ''" in fails(["collect", str(job.path), "--run-dir", ""], capsys)
    assert main(["estimate", str(job.path), "--run-dir", str(other)]) == 0
    assert not job.run_dir.exists()
    assert f"{job.run_dir}: 'gradients' needs 'data'" in fails(
        ["collect", str(other), "--run-dir", str(job.run_dir)], capsys
    ), "a run folder is a configuration, too"
    for verb in (["status"], ["verify"], ["target", "list"]):
        message = fails([*verb, str(job.path)], capsys)
        assert message == f"{job.path}: a file; give the run folder instead: run_dir of the configuration, or runs/job"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "damaged: its contents do not match the checksum in it"),
        ('{"format": 1, "stages": {}}', "of format 1, of an earlier gradpursuit, which kept no checksum of it"),
        ('{"format": 2, "stages": {}}', "damaged: its contents do not match the checksum in it"),
        ('{"format": 2, "stages": {}, "sha256": 5}', "damaged: its contents do not match the checksum in it"),
        ("[" * 200_000, "damaged: it is not the JSON that was written"),
        ("", "damaged: it is not the JSON that was written"),
    ],
)
def test_a_manifest_that_is_none(job: Job, content: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    job.run_dir.mkdir()
    (job.run_dir / "config.yaml").write_text(sealed_text(job.path.read_text()))
    (job.run_dir / "manifest.json").write_text(content)
    run_id(job.run_dir)  # a run, whose manifest was changed
    for verb in ("status", "select", "report", "verify"):
        assert fails([verb, str(job.run_dir)], capsys).count(f"{job.run_dir / 'manifest.json'}: {words}") == 1


def test_run_folder_and_flags_may_stand_anywhere(job: Job) -> None:
    assert main(["warmup", "--selection.k", "3", str(job.path), "--seed=4"]) == 0
    config = (job.run_dir / "config.yaml").read_text()
    assert "seed: 4" in config
    assert "k: 3" in config


def test_messages_schema_and_a_split_of_the_target(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    def messages(row: dict[str, object]) -> dict[str, object]:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        return {"messages": turns}

    job.write("pool.jsonl", [messages(job.row(i)) for i in range(20)])
    job.write("target.jsonl", [messages(job.row(i, "times")) for i in range(10)])
    job.save(data={"heldout": []})
    assert main(["run", str(job.path)]) == 0
    printed = capsys.readouterr()
    assert "3 of 10 target rows are set aside for scoring" in printed.err
    assert "after, by seed" in printed.err
    assert printed.out == f"{job.run_dir}\n", "nothing but data goes into a pipe"
    assert Path(job.run_dir / "selection/gtp/selected.jsonl").read_text().count('"messages"') == 5


def test_a_moved_run_folder_is_used_where_it_is(job: Job) -> None:
    assert main(["warmup", str(job.path)]) == 0
    moved = job.folder / "moved"
    job.run_dir.rename(moved)
    assert main(["collect", str(moved)]) == 0
    assert (moved / "gradients/pool").is_dir()
    assert not job.run_dir.exists()


def test_a_run_folder_may_have_any_name(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(job.folder)
    for name in ("2024", "true", "a: b # c"):
        assert main(["run", str(job.path), "--run-dir", name, "--selection.k", "99"]) == 2, "k, not the name"
        Path(name).mkdir()
        assert main(["run", str(job.path), "--run-dir", name, "--data.max_tokens", "9"]) == 2
        assert (job.folder / name / "log.txt").is_file()


def test_a_mistake_leaves_no_run_folder_behind(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    for setting in (["--selection.strategies", "foo"], ["--data.pool", "gone.jsonl"], ["--selection.k", "99"]):
        fails(["run", str(job.path), *setting], capsys)
        assert not job.run_dir.exists()
    fails(["run", str(job.path), "--run-dir", str(job.folder / "new/runs/a"), "--selection.k", "99"], capsys)
    assert not (job.folder / "new").exists(), "no folder above it either"
    (job.folder / "old").mkdir()
    fails(["run", str(job.path), "--run-dir", str(job.folder / "old/a"), "--selection.k", "99"], capsys)
    assert (job.folder / "old").is_dir()
    assert main(["warmup", str(job.path)]) == 0
    fails(["run", str(job.path), "--selection.k", "99"], capsys)
    assert (job.run_dir / "trajectory/checkpoint-1").is_dir()


def test_a_moved_run_folder_is_replayed_where_it_is(job: Job) -> None:
    assert main(["warmup", str(job.path)]) == 0
    moved = job.folder / "moved"
    job.run_dir.rename(moved)
    assert main(["run", str(moved / "config.yaml"), "--selection.strategies", "random"]) == 0
    assert (moved / "selection/random/selected.jsonl").is_file()
    assert not job.run_dir.exists()


def test_home_is_understood_and_keys_given_twice_are_not(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(job.tree["model"]["path"]).parent))
    name = Path(job.tree["model"]["path"]).name
    assert main(["warmup", str(job.path), "--model.path", f"~/{name}"]) == 0
    job.path.write_text(job.path.read_text() + "\nseed: 1\nseed: 2\n")
    assert "the key 'seed' is given twice" in fails(["run", str(job.path)], capsys)


def test_without_a_hub_a_hub_id_fails_at_once(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_name(*_arguments: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", no_name)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    started = time.monotonic()
    message = fails(["run", str(job.path), "--model.path", "nobody/no-such-model"], capsys)
    assert "the hub cannot be reached, and its cache does not hold the model" in message
    assert time.monotonic() - started < 10


def test_memory_and_disk_errors_are_one_message(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from gradpursuit.trajectory import warmup

    def fail_with(error: BaseException) -> None:
        def train(*_args: object, **_options: object) -> None:
            raise error

        monkeypatch.setattr(warmup, "train", train)

    fail_with(torch.OutOfMemoryError("tried to allocate"))
    assert "trajectory: out of memory on cpu; lower gradients.tokens_per_batch" in fails(["run", str(job.path)], capsys)
    fail_with(OSError(28, "No space left on device", "/somewhere"))
    assert "/somewhere: No space left on device; finished work is kept" in fails(["run", str(job.path)], capsys)
