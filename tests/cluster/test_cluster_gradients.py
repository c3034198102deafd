"""Gradients on workers that die, join and leave, with stores on a disk and in S3: the features of one process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from nodes import NODE, Cluster

from gradpursuit.cluster import ClusterFill, Resources, Session
from gradpursuit.config import EngineSection, RunConfig, load_config
from gradpursuit.errors import RunError, TrajectoryError
from gradpursuit.gradient_stage import collector, splits
from gradpursuit.pipeline import Run
from gradpursuit.remote import place
from gradpursuit.store import GradientStore
from jobs import Job
from server import Server

RESOURCES = Resources(NODE["num_cpus"])  # one worker a node
SESSION = Session(EngineSection(name="ray"))


@pytest.fixture(scope="module")
def warm(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run whose trajectory is there, and in `whole` the same with gradients and selections of one process."""
    job = Job(tmp_path_factory.mktemp("warm"), tiny_path)
    job.save(gradients={"dim": 128, "shard_rows": 4})
    config = load_config(job.path)
    Run(config).execute("trajectory")
    shutil.copytree(job.run_dir, job.folder / "whole")
    Run(moved(config, job.folder / "whole")).execute("export")
    return job


@pytest.fixture
def run(warm: Job, tmp_path: Path) -> Run:
    """A copy of the run without gradients."""
    shutil.copytree(warm.run_dir, tmp_path / "run")
    return Run(moved(load_config(warm.path), tmp_path / "run"))


def moved(config: RunConfig, folder: Path, **sections: Any) -> RunConfig:
    return config.model_copy(update={"run_dir": str(folder), **sections})


def fill_pool(run: Run, at_shard: Mapping[int, Callable[[ClusterFill], None]]) -> ClusterFill:
    """Collect the pool; after the given numbers of finished shards something happens."""
    pool = splits(run)[-1]
    with collector(run) as made, ClusterFill(SESSION, partial(collector, run), made.precision, RESOURCES) as fill:

        def disturbed(*arguments: Any) -> Iterator[Mapping[int, str]]:
            for done, dropped in enumerate(fill(*arguments), 1):
                at_shard.get(done, lambda _: None)(fill)
                yield dropped

        made.fill = disturbed
        made.collect(pool.name, pool.table, pool.kinds, pool.folder)
    return fill


def same_features(folder: Path, whole: Path) -> None:
    """Stores of a pool hold what one process computed."""
    labels = [path.parent.name for path in whole.glob("pool/*/manifest.json")]
    assert len(labels) == 2
    for label in labels:
        found, expected = (GradientStore.open(f / "pool" / label) for f in (folder, whole))
        assert found.ids() == expected.ids()
        for ours, theirs in zip(found.features(), expected.features(), strict=True):
            left, right = (np.concatenate([np.asarray(block) for block in blocks]) for blocks in (ours, theirs))
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(right).max())


def computing() -> int:
    """The process of a worker that computes a shard now."""
    while True:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "GradientWorker.fill" in " ".join(process.cmdline()):
                    return process.pid
        time.sleep(0.01)


def finished(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every shard that is there, with what changes when it is written again."""
    found = {path: path.stat() for path in folder.rglob("shard-*.safetensors")}
    return {path: (one.st_mtime_ns, one.st_ino) for path, one in found.items()}


def test_a_worker_killed_in_the_middle_gives_its_shard_back(cluster: Cluster, warm: Job, run: Run) -> None:
    before: dict[Path, tuple[int, int]] = {}

    def kill(fill: ClusterFill) -> None:
        pid = computing()
        before.update(finished(run.folder))
        os.kill(pid, signal.SIGKILL)

    fill = fill_pool(run, {2: kill})
    assert fill.lost == 1
    assert before
    assert before.items() <= finished(run.folder).items()
    same_features(run.folder / "gradients", warm.folder / "whole" / "gradients")


def test_nodes_join_and_leave(cluster: Cluster, warm: Job, run: Run) -> None:
    joined: list[Any] = []
    fill = fill_pool(
        run, {1: lambda _: joined.append(cluster.add_node(**NODE)), 5: lambda _: cluster.remove_node(joined.pop())}
    )
    assert fill.begun >= 3
    same_features(run.folder / "gradients", warm.folder / "whole" / "gradients")


def test_what_a_worker_refuses_is_told_here(cluster: Cluster, run: Run) -> None:
    path = run.folder / "trajectory" / "checkpoint-1" / "adapter_model.safetensors"
    with pytest.raises(RunError, match=r"node .*no checkpoint-1.*every node must see the run folder") as error:
        fill_pool_elsewhere(run)
    assert str(run.folder.with_name("hidden")) in str(error.value)
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(TrajectoryError, match="cannot be read"):
        fill_pool(run, {})


def fill_pool_elsewhere(run: Run) -> None:
    """As on a node that does not see the run folder."""
    hidden = run.folder.with_name("hidden")
    elsewhere = Run(moved(run.config, hidden))
    pool = splits(run)[-1]
    with collector(run) as made, ClusterFill(SESSION, partial(collector, elsewhere), "float32", RESOURCES) as fill:
        made.fill = fill
        made.collect(pool.name, pool.table, pool.kinds, pool.folder)


def test_a_driver_that_is_killed_goes_on_and_ends_with_the_selection_of_one_machine(
    cluster: Cluster, server: Server, warm: Job, tmp_path: Path, printed: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(warm.run_dir, folder)
    on_ray = ["--engine", "ray", "--address", cluster.address, "--engine.cpus", str(NODE["num_cpus"])]
    command = server.start(["collect", str(folder), *on_ray], printed)
    while command.is_alive() and len(finished(folder / "gradients" / "pool")) < 4:
        time.sleep(0.02)
    command.signal(signal.SIGKILL)
    assert command.wait()[0] == -signal.SIGKILL
    before = finished(folder)
    code, text = server.start(["run", str(folder / "config.yaml"), *on_ray], printed).wait()
    assert code == 0, text
    assert before.items() <= finished(folder).items()
    same_features(folder / "gradients", warm.folder / "whole" / "gradients")
    for strategy in ("gtp", "less", "random"):
        path = Path("selection") / strategy / "selected.jsonl"
        assert (folder / path).read_text() == (warm.folder / "whole" / path).read_text()
    report = (folder / "report.json").read_text()
    assert '"traffic"' in report
    assert "taking over the lock" in text


def test_features_in_s3_give_the_same_selection_and_the_key_is_written_nowhere(
    cluster: Cluster, s3: str, secret: str, warm: Job, run: Run
) -> None:
    import ray

    store = f"{s3}/run"
    sections = {
        "gradients": run.config.gradients.model_copy(update={"store": store}),
        "engine": EngineSection(name="ray", cpus=NODE["num_cpus"]),
    }
    remote = Run(moved(run.config, run.folder, **sections))
    remote.execute("export")
    assert not (run.folder / "gradients").exists()
    same_features(place(store), warm.folder / "whole" / "gradients")
    chosen = (run.folder / "selection" / "gtp" / "selected.jsonl").read_text()
    assert chosen == (warm.folder / "whole" / "selection" / "gtp" / "selected.jsonl").read_text()
    # A shard that is damaged and one that is missing are made again, and no other.
    pool = GradientStore.open(place(store) / "pool" / "adam-symmetric")
    times = {path: path.stat().st_mtime for path in map(pool.path, [0, 0, 1], [0, 1, 2])}
    time.sleep(1.1)  # the clock of S3 ticks once a second
    damaged, missing, whole = times
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    missing.unlink()
    assert [pool.state(t, s).state for t, s in ((0, 0), (0, 1), (1, 2))] == ["broken", "missing", "whole"]
    remote.execute("gradients")
    assert missing.stat().st_mtime > times[missing]
    assert whole.stat().st_mtime == times[whole]
    same_features(place(store), warm.folder / "whole" / "gradients")
    logs = Path(ray._private.worker._global_node.get_session_dir_path())
    written = [path for folder in (run.folder, logs) for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 20
    for path in written:
        assert secret.encode() not in path.read_bytes(), path
