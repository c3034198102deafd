"""What a kill, a full disk or a broken file cannot take away: real processes, real signals, real files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs import Job
from server import Command, Server

SHARDS = "gradients/{}/checkpoint-{}/shard-{:05d}.safetensors"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def small_job(folder: Path, model: Path) -> Job:
    """31 pool rows in 8 shards and 3 target rows in one, at two checkpoints: 68 rows × checkpoints."""
    job = Job(folder, model)
    job.write("target.jsonl", [job.row(i, "times") for i in range(3)])
    job.save(gradients={"dim": 512, "shard_rows": 4})
    return job


@pytest.fixture(scope="module")
def warm(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A run whose warm-up is done, in `run`, and whose gradients are collected, in `whole`."""
    job = small_job(tmp_path_factory.mktemp("warm"), tiny_path)
    assert server.here(["warmup", str(job.path), "--quiet"]) == 0
    shutil.copytree(job.run_dir, job.folder / "whole")
    assert server.here(["collect", str(job.folder / "whole"), "--quiet"]) == 0
    return job.folder


@pytest.fixture
def folder(warm: Path, tmp_path: Path) -> Path:
    """A copy of the run whose warm-up is done."""
    return Path(shutil.copytree(warm / "run", tmp_path / "run"))


def done(server: Server, arguments: list[str], tmp: Path) -> tuple[int, str]:
    return server.start(arguments, tmp / "printed.txt").wait()


def files(folder: Path) -> dict[str, bytes]:
    """Every file, but those that say when."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Time of change and inode of every shard: a file that is written again has others."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("shard-*.safetensors")}


def wait_until(command: Command, reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert command.is_alive(), f"over before the moment came: {command.wait()}"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def shard(folder: Path, store: str, checkpoint: int, number: int) -> Callable[[], bool]:
    return (folder / SHARDS.format(store, checkpoint, number)).is_file


def finished_rows(folder: Path) -> int:
    """Rows × checkpoints that are there in every store, counted in another way than the program does."""
    stores = {"pool": ("adam-symmetric", "adam-uncorrected"), "target": ("adam-symmetric", "identity")}
    rows = {"pool": [4] * 7 + [3], "target": [3]}
    return sum(
        count
        for split, labels in stores.items()
        for checkpoint in (1, 2)
        for number, count in enumerate(rows[split])
        if all((folder / SHARDS.format(f"{split}/{label}", checkpoint, number)).exists() for label in labels)
    )


MOMENTS = {
    "a file half written": lambda folder: lambda: any(folder.rglob("gradients/**/*.part")),
    "the first shard": lambda folder: shard(folder, "target/adam-symmetric", 1, 0),
    "the second shard of the pool": lambda folder: shard(folder, "pool/adam-symmetric", 1, 1),
    "the second checkpoint": lambda folder: shard(folder, "pool/adam-symmetric", 2, 0),
    "the last shard of one store": lambda folder: shard(folder, "pool/adam-symmetric", 2, 7),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_gradients_killed_at_any_moment(server: Server, warm: Path, folder: Path, moment: str) -> None:
    command = server.start(["collect", str(folder)], folder.parent / "killed.txt")
    wait_until(command, MOMENTS[moment](folder))
    command.signal(signal.SIGKILL)
    assert command.wait()[0] == -signal.SIGKILL
    finished = stamps(folder / "gradients")
    state = json.loads(done(server, ["status", str(folder), "--json"], folder.parent)[1])
    assert state["owner"] is None
    gradients = {stage["stage"]: stage for stage in state["stages"]}["gradients"]
    assert (gradients["state"], gradients["total"], gradients["rate"]) == ("unfinished", 68, None)
    assert gradients["done"] == finished_rows(folder)

    code, printed = done(server, ["collect", str(folder)], folder.parent)
    assert code == 0, printed
    assert f"taking over the lock of pid {command.pid} on " in printed
    again = stamps(folder / "gradients")
    assert {path: again[path] for path in finished} == finished, "a finished shard was computed again"
    assert files(folder / "gradients") == files(warm / "whole" / "gradients")


@pytest.mark.parametrize(
    "moment",
    ["trajectory/checkpoint-1.*.part/moments.safetensors*", "trajectory/checkpoint-1", "trajectory/checkpoint-2"],
)
def test_warm_up_killed_at_any_moment(server: Server, warm: Path, tiny_path: Path, tmp_path: Path, moment: str) -> None:
    job = small_job(tmp_path, tiny_path)
    folder, arguments = job.run_dir, ["warmup", str(job.path)]
    command = server.start(arguments, tmp_path / "killed.txt")
    wait_until(command, lambda: any(folder.glob(moment)))
    command.signal(signal.SIGKILL)
    assert command.wait()[0] == -signal.SIGKILL
    kept = (folder / "data/pool.parquet").stat().st_mtime_ns
    assert json.loads((folder / "manifest.json").read_text())["stages"]["trajectory"]["state"] == "running"
    assert done(server, arguments, tmp_path)[0] == 0
    assert (folder / "data/pool.parquet").stat().st_mtime_ns == kept
    assert files(folder / "trajectory") == files(warm / "run" / "trajectory")


def test_a_second_process_is_refused_and_told_of_the_first(server: Server, warm: Path, folder: Path) -> None:
    command = server.start(["collect", str(folder)], folder.parent / "first.txt")
    wait_until(command, shard(folder, "pool/adam-symmetric", 1, 2))
    command.signal(signal.SIGSTOP)
    try:
        time.sleep(1.1)  # progress is told once a second: at the next batch, now, however fast the machine
        command.signal(signal.SIGCONT)
        wait_until(command, lambda: json.loads((folder / "progress.json").read_text())["done"] >= 6 + 12)
        command.signal(signal.SIGSTOP)
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        refusals = [
            done(server, arguments, folder.parent)
            for arguments in (["collect", str(folder)], ["run", str(folder / "config.yaml"), "--warmup.epochs", "1"])
        ]
        code, printed = done(server, ["status", str(folder), "--json"], folder.parent)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    finally:
        command.signal(signal.SIGCONT)
    for refused, message in refusals:
        assert refused == 2
        for words in (f"at work in this run folder: pid {command.pid} on {os.uname().nodename}, since 20", "Wait for"):
            assert words in message
    assert code == 0
    state = json.loads(printed)
    assert state["owner"]["pid"] == command.pid
    gradients = {stage["stage"]: stage for stage in state["stages"]}["gradients"]
    assert gradients["state"] == "running"
    assert gradients["now"]["what"] == "gradients of the pool"
    assert gradients["done"] >= 6 + 12
    assert gradients["total"] == 68
    assert gradients["rate"] > 0
    assert gradients["left"] == pytest.approx((68 - gradients["done"]) / gradients["rate"])
    assert command.wait()[0] == 0
    assert files(folder / "gradients") == files(warm / "whole" / "gradients")
    assert not (folder / "progress.json").exists()


def test_a_file_size_limit_is_one_message_and_finished_work_is_kept(server: Server, warm: Path, folder: Path) -> None:
    command = server.start(["collect", str(folder)], folder.parent / "printed.txt", largest_file=9000)
    code, printed = command.wait()
    assert code == 2
    assert printed.count("error: ") == 1
    assert "shard-00000.safetensors: larger than a file may be here" in printed
    assert "Traceback" not in printed
    resumes_to_the_same(server, warm, folder)


def fill(path: Path) -> None:
    """Write to `path` until its disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 120 MB, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_message_and_finished_work_is_kept(server: Server, warm: Path, small_disk: Path) -> None:
    folder = Path(shutil.copytree(warm / "run", small_disk / "run"))
    command = server.start(["collect", str(folder)], small_disk.parent / "printed.txt")
    wait_until(command, shard(folder, "pool/adam-symmetric", 1, 1))
    command.signal(signal.SIGSTOP)
    ballast = small_disk / "ballast"
    fill(ballast)
    command.signal(signal.SIGCONT)
    code, printed = command.wait()
    assert code == 2, printed
    assert printed.count("error: ") == 1
    assert "no space left on the disk; free some and run again: finished work is kept" in printed
    assert "Traceback" not in printed
    ballast.unlink()
    resumes_to_the_same(server, warm, folder)


def resumes_to_the_same(server: Server, warm: Path, folder: Path) -> None:
    finished = stamps(folder / "gradients")
    assert finished, "nothing was finished, so nothing is shown to be kept"
    code, printed = done(server, ["collect", str(folder)], warm)
    assert code == 0, printed
    assert "taking over" not in printed
    again = stamps(folder / "gradients")
    assert {path: again[path] for path in finished} == finished
    assert files(folder / "gradients") == files(warm / "whole" / "gradients")


def test_broken_shards_are_named_and_they_alone_are_computed_again(server: Server, warm: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(warm / "whole", tmp_path / "run"))
    truncated, flipped, gone = (
        folder / SHARDS.format(*which)
        for which in (("pool/adam-symmetric", 1, 3), ("pool/adam-uncorrected", 2, 5), ("target/identity", 2, 0))
    )
    truncated.write_bytes(truncated.read_bytes()[:-100])
    content = bytearray(flipped.read_bytes())
    content[-7] ^= 4
    flipped.write_bytes(content)
    gone.unlink()
    others = {path: stamp for path, stamp in stamps(folder).items() if path not in (truncated, flipped)}
    code, printed = done(server, ["collect", str(folder)], tmp_path)
    assert code == 0
    assert f"{truncated}: not a whole shard" in printed
    assert f"{flipped}: its bytes do not match their checksum" in printed
    assert f"{gone}: not there" in printed
    again = stamps(folder)
    assert {path for path in again if others.get(path) != again[path]} == {truncated, flipped, gone}
    assert files(folder / "gradients") == files(warm / "whole" / "gradients")
