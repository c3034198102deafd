"""Gradients on workers that die, join and leave, with stores on a disk and in S3: the features of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from nodes import NODE, Cluster
from ray import cloudpickle
from ray.exceptions import RayError

from gradpursuit.cluster import Resources, Session
from gradpursuit.cluster.collect import ClusterFill
from gradpursuit.config import EngineSection, RunConfig, load_config
from gradpursuit.errors import RunError, TrajectoryError
from gradpursuit.gradient_stage import collector, splits
from gradpursuit.pipeline import Run
from gradpursuit.remote import RemoteRows, place
from gradpursuit.selection_problem import load_problem
from gradpursuit.store import GradientStore
from jobs import Job
from server import Server

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
RESOURCES = Resources(NODE["num_cpus"])  # one worker a node
SESSION, ONE = Session(EngineSection(name="ray")), Session(EngineSection(name="ray", workers=1))


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
    """Collect the pool; after so many finished shards, or with so many left (negative), something happens."""
    pool = splits(run)[-1]
    with collector(run) as made, ClusterFill(SESSION, partial(collector, run), made.precision, RESOURCES) as fill:

        def disturbed(*arguments: Any) -> Iterator[Mapping[int, str]]:
            todo = arguments[2]
            for done, dropped in enumerate(fill(*arguments), 1):
                for number in (done, done - len(todo)):
                    at_shard.get(number, lambda _: None)(fill)
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
        assert found.spec.ids == expected.spec.ids
        np.testing.assert_array_equal(found.kept(), expected.kept())
        for ours, theirs in zip(found.features(), expected.features(), strict=True):
            left, right = (np.concatenate([np.asarray(block) for block in blocks]) for blocks in (ours, theirs))
            np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * np.abs(right).max())


def node_of(_: Any) -> str:
    return str(ray.get_runtime_context().get_node_id())


def die_in_next_shard(worker: Any) -> None:
    """From now on the process is killed when it has computed a shard, before it writes it."""
    compute = worker._filler.shards

    def shards(*arguments: Any) -> None:
        compute(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    worker._filler.shards = shards


def stick_in_next_shard(worker: Any) -> None:
    """From now on it never comes back from a shard."""
    worker._filler.shards = lambda *_: time.sleep(3600)


def version(path: Any) -> str:
    """Of an object in S3: another one whenever it is written."""
    import boto3

    bucket, _, key = path.path.partition("/")
    found: str = boto3.client("s3").head_object(Bucket=bucket, Key=key)["VersionId"]
    return found


def finished(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every shard that is there, with what changes when it is written again."""
    found = {path: path.stat() for path in folder.rglob("shard-*.safetensors")}
    return {path: (one.st_mtime_ns, one.st_ino) for path, one in found.items()}


def test_workers_that_die_and_nodes_that_join_and_leave_change_nothing(cluster: Cluster, warm: Job, run: Run) -> None:
    before: dict[Path, tuple[int, int]] = {}
    joined: list[Any] = []

    def kill(fill: ClusterFill) -> None:
        one = next(worker for worker in fill._workers if worker.ready)
        ray.get(one.actor.__ray_call__.remote(die_in_next_shard))
        before.update(finished(run.folder))

    def join(_: ClusterFill) -> None:
        joined.append(cluster.add_node(**NODE))

    def stick(fill: ClusterFill) -> None:
        found = {}
        for worker in fill._workers:
            with suppress(RayError):  # one was killed
                found[ray.get(worker.actor.__ray_call__.remote(node_of))] = worker
        ray.get(found[joined[0].node_id].actor.__ray_call__.remote(stick_in_next_shard))

    def leave(_: ClusterFill) -> None:
        cluster.remove_node(joined[0])  # what it was at is left to others, which have been idle for some time

    fill = fill_pool(run, {2: kill, 3: join, 5: stick, -1: leave})
    assert fill.lost == 2
    assert fill.begun >= 4
    assert before
    assert before.items() <= finished(run.folder).items()
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
    with collector(run) as made, ClusterFill(ONE, partial(collector, elsewhere), "float32", RESOURCES) as fill:
        made.fill = fill
        made.collect(pool.name, pool.table, pool.kinds, pool.folder)


def test_a_driver_that_is_killed_goes_on_and_ends_with_the_selection_of_one_machine(
    cluster: Cluster, server: Server, warm: Job, tmp_path: Path, printed: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(warm.run_dir, folder)
    on_ray = ["--engine", "ray", "--address", cluster.address, "--engine.workers", "1"]
    command = server.start(["collect", str(folder), *on_ray], printed)
    while command.is_alive() and len(finished(folder / "gradients" / "pool")) < 4:
        time.sleep(0.02)
    command.signal(signal.SIGKILL)
    assert command.wait()[0] == -signal.SIGKILL
    before = finished(folder)
    told = ""
    for verb in ("collect", "select", "export"):
        code, text = server.start([verb, str(folder), *on_ray], printed).wait()
        assert code == 0, text
        told += text
    assert before.items() <= finished(folder).items()
    same_features(folder / "gradients", warm.folder / "whole" / "gradients")
    for strategy in ("gtp", "less", "random"):
        path = Path("selection") / strategy / "selected.jsonl"
        assert (folder / path).read_text() == (warm.folder / "whole" / path).read_text()
    page, data = Run(load_config(folder / "config.yaml")).report()
    lines = {line["strategy"]: line for line in json.loads(data.read_text())["strategies"]}
    assert len(lines["gtp"]["traffic"]["passes"]) > 1
    assert "gtp was pursued on 1 worker in" in page.read_text()
    assert "taking over the lock" in told


def test_features_in_s3_give_the_same_selection_and_the_key_is_written_nowhere(
    cluster: Cluster, s3: str, secret: str, warm: Job, run: Run
) -> None:
    store = f"{s3}/run"
    sections = {
        "gradients": run.config.gradients.model_copy(update={"store": store}),
        "engine": EngineSection(name="ray", workers=1),
    }
    remote = Run(moved(run.config, run.folder, **sections))
    remote.execute("export")
    assert [path.name for path in (run.folder / "gradients").iterdir()] == ["dropped.jsonl"]
    same_features(place(store), warm.folder / "whole" / "gradients")
    chosen = (run.folder / "selection" / "gtp" / "selected.jsonl").read_text()
    assert chosen == (warm.folder / "whole" / "selection" / "gtp" / "selected.jsonl").read_text()
    made = [json.loads(one.report()[1].read_text()) for one in (remote, Run(moved(run.config, warm.folder / "whole")))]
    assert made[0]["fit"]["strategies"] == pytest.approx(made[1]["fit"]["strategies"])
    fetched = load_problem(remote, few=True)[0].pool["adam-symmetric"].blocks[0][0].values
    assert isinstance(fetched, RemoteRows)
    assert fetched[1].tolist() == np.asarray(fetched)[1].tolist() == np.asarray(fetched[1:])[0].tolist()
    # A shard that is damaged and one that is missing are made again, and no other.
    pool = GradientStore.open(place(store) / "pool" / "adam-symmetric")
    damaged, missing, whole = map(pool.path, [0, 0, 1], [0, 1, 2])
    kept = version(whole)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(bytes(content))
    missing.unlink()
    assert [pool.state(t, s).state for t, s in ((0, 0), (0, 1), (1, 2))] == ["broken", "missing", "whole"]
    remote.execute("gradients")
    assert version(whole) == kept
    same_features(place(store), warm.folder / "whole" / "gradients")
    logs = Path(ray._private.worker._global_node.get_session_dir_path())
    written = [path for folder in (run.folder, logs) for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 20
    for path in written:
        assert secret.encode() not in path.read_bytes(), path
