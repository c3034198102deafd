"""Workers and nodes that die in the middle of a pursuit change nothing; all of Ray stays on this machine."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from nodes import NODE, Cluster
from pools import Pool, same
from ray import cloudpickle

from gradpursuit.cluster.session import Session
from gradpursuit.cluster.team import Team
from gradpursuit.config import EngineSection
from gradpursuit.errors import RunError

SESSION = Session(EngineSection(name="ray"))
cloudpickle.register_pickle_by_value(
    sys.modules[__name__]
)  # what workers are told to do is sent, as they cannot import it


def pid_of(team: Team, place: int) -> int:
    return int(ray.get(team.members[place].actor.__ray_call__.remote(lambda self: os.getpid())))


def die_in_next_pass(worker: Any) -> None:
    """From now on the process is killed when it has begun to multiply its rows."""
    from gradpursuit.pursuit import TrajectoryMatrix

    def correlate(matrix: Any, r: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    TrajectoryMatrix.correlate = correlate  # type: ignore[assignment,method-assign]


def test_everything_of_ray_listens_on_and_talks_to_this_machine_alone(cluster: Cluster) -> None:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    names = {process.name() for process in processes}
    assert {"gcs_server", "raylet"} <= names
    assert any(name.startswith("ray::") for name in names)
    assert not any(name.startswith("ray::DashboardHead") for name in names)
    connections = [(process.name(), one) for process in processes for one in process.net_connections("inet")]
    assert sum(one.status == "LISTEN" for _, one in connections) > 4
    for name, one in connections:
        for address in (one.laddr, one.raddr):
            assert not address or address.ip in ("127.0.0.1", "::1", "::ffff:127.0.0.1"), (name, one)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_workers_killed_in_and_between_passes_leave_the_same_answer(cluster: Cluster, tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    team = Team.begin(SESSION, 3)
    matrix = pool.on(team)
    accepted: list[int] = []

    def kill(step: Any, support: Any) -> None:
        accepted.append(step.iteration)
        if len(accepted) == 1:
            ray.get(team.members[0].actor.__ray_call__.remote(die_in_next_pass))
        if len(accepted) == 2:
            os.kill(pid_of(team, 1), signal.SIGKILL)

    found = pool.pursue(matrix, kill)
    assert len(accepted) > 3
    assert team.lost == 2
    assert len(team.members) == matrix.workers == 1
    same(found, pool.pursue(pool.matrix()))
    # Only what was lost was asked again: of three workers two take over, of two one.
    sent = [one.residual_bytes // (8 * 60) for one in matrix.traffic.passes]
    assert sent[0] in (4, 5)
    assert sent[1] == 3
    assert set(sent[2:]) == {1}
    os.kill(pid_of(team, 0), signal.SIGKILL)  # which owned what two others had owned before
    with pytest.raises(RunError, match="3 workers that held it died") as error:
        matrix.correlate(pool.target)
    assert str(pool.store.path(0, 0).parent) in str(error.value)
    team.close()


def test_when_all_workers_die_at_once_a_new_one_begins(cluster: Cluster, tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    team = Team.begin(SESSION, 3)
    matrix = pool.on(team)
    matrix.squared_norms()
    for pid in [pid_of(team, place) for place in range(3)]:
        os.kill(pid, signal.SIGKILL)
    same(pool.pursue(matrix), pool.pursue(pool.matrix()))  # though shards were given to three that were dead
    assert (team.lost, len(team.members)) == (3, 1)
    team.close()


def test_a_worker_of_another_version_is_refused_at_once(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradpursuit.cluster.team.__version__", "0.0.1")
    team = Team.begin(SESSION, 1)
    with pytest.raises(RunError, match=r"a worker cannot begin: .* has gradpursuit .*, the driver 0\.0\.1; every node"):
        Pool(tmp_path).on(team).squared_norms()
    assert team.lost == 0
    team.close()


def test_a_node_that_is_removed_leaves_the_same_answer(cluster: Cluster, tmp_path: Path) -> None:
    pool = Pool(tmp_path)
    node = cluster.add_node(**NODE)
    team = Team.begin(SESSION, 3)
    matrix = pool.on(team)
    there = [
        ray.get(member.actor.__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id()))
        for member in team.members
    ]
    gone = there.count(node.node_id)
    assert 0 < gone < 3
    removed: list[int] = []

    def remove(step: Any, support: Any) -> None:
        if not removed:
            removed.append(step.iteration)
            cluster.remove_node(node)

    found = pool.pursue(matrix, remove)
    assert removed
    assert team.lost == gone
    same(found, pool.pursue(pool.matrix()))
    team.close()
