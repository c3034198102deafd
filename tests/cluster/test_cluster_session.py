"""How a run is put on a cluster: settings, what is not installed, a cluster of this machine alone, no secrets."""

from __future__ import annotations

import socket
import socketserver
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from gradpursuit.cli import main
from gradpursuit.cluster import connected
from gradpursuit.cluster.errors import reason_of
from gradpursuit.config import EngineSection, build_config
from gradpursuit.errors import ConfigError
from gradpursuit.opening import read_config
from gradpursuit.remote import place
from gradpursuit.shown import without_secrets
from jobs import Job

ALONE = """
import psutil
from gradpursuit.cluster import Team, connected
from gradpursuit.config import EngineSection

with connected(EngineSection(name="ray", workers=1)) as session:
    import ray
    team = Team.begin(session)
    print(ray.get(team.members[0].actor.timing.remote()))
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    for process in processes:
        for one in process.net_connections("inet"):
            for address in filter(None, (one.laddr, one.raddr)):
                print("address", address.ip)
    team.close()
print("left", len(psutil.Process().children(recursive=True)))
"""


def test_a_cluster_started_for_a_command_is_of_this_machine_alone_and_ends_with_it() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    addresses = {line.removeprefix("address ") for line in lines if line.startswith("address")}
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert lines[-1] == "left 0"


def test_an_address_where_no_cluster_is_is_told_before_any_work(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert main(["run", str(job.path), "--engine", "ray", "--address", address]) == 2
    assert f"no Ray cluster can be reached at {address}: Connection refused; look at `ray" in capsys.readouterr().err
    assert not (job.run_dir / "data").exists()
    with socketserver.TCPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{other.server_address[1]}"
        assert main(["run", str(job.path), "--engine", "ray", "--address", address]) == 2
        other.shutdown()
    told = capsys.readouterr().err
    assert f"{address}: something else than Ray listens there; look at" in told
    assert "or give --address null to start one on this machine" in told
    assert not (job.run_dir / "data").exists()
    for address in ("nonsense", "local", "ray://head:10001", "head:99999"):
        with pytest.raises(ValidationError, match="expected host:port of the cluster's head"):
            EngineSection(name="ray", address=address)


def test_without_ray_the_message_says_what_to_install(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["run", str(job.path), "--engine", "ray"]) == 2
    assert "pip install 'gradpursuit[ray]'" in capsys.readouterr().err
    assert not job.run_dir.exists()  # it is told before any work
    with pytest.raises(ConfigError, match="leave --engine ray out"), connected(EngineSection(name="ray")):
        pass


def test_settings_that_do_not_fit_are_refused(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (["--address", "127.0.0.1:6379"], "address is given, but name is 'local'"),
        (
            ["--engine", "ray", "--address", ""],
            "flag '--engine.address' has no value: write --engine.address VALUE, or",
        ),
        (["--engine", "ray", "--gradients.store", "/proc/nope"], "/proc/nope: this folder cannot be made"),
        (["--engine", "dask"], "--engine.name: 'engine.name' = 'dask'"),
        (["--pursuit.parts", "3"], "strategy 'gtp': parts is 3, but"),
        (["--selection.options", "{gtp: {parts: 3}}"], "strategy 'gtp': parts is 3, but"),
        (["--engine", "ray", "--pursuit.parts", "3", "--pursuit.subspace", "target"], "leave subspace out"),
        (["--engine", "ray", "--engine.cpus", "0"], "'engine.cpus' = 0"),
    ):
        assert main(["run", str(job.path), *flags]) == 2
        assert words in capsys.readouterr().err


def test_urls_and_addresses_with_secrets_are_refused_and_not_repeated() -> None:
    for section, key, value in (
        ("gradients", "store", "s3://user:hunter2@bucket/run"),
        ("gradients", "store", "az://container/run?sig=hunter2"),
        ("engine", "address", "ray://user:hunter2@head:10001"),
    ):
        tree = {
            "model": {"path": "m"},
            "data": {"pool": "p", "target": "t"},
            "engine": {"name": "ray"},
        }
        tree[section] = {**tree.get(section, {}), key: value}  # type: ignore[dict-item]
        with pytest.raises(ConfigError, match="must not hold a user, password, key or signature") as error:
            build_config(tree, "job.yaml")
        assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_CONNECTION_STRING"])
def test_messages_of_libraries_lose_their_secrets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hunter2hunter2")
    told = without_secrets(
        'EndpointConnectionError: no connection to "http://me:hunter2@host:9000/features/a?X-Amz-Signature=hunter2" '
        "with hunter2hunter2; is it up?"
    )
    assert "hunter2" not in told
    assert "host:9000/features/a" in told
    assert told.endswith("is it up?")


def test_of_a_lost_worker_the_reason_is_told() -> None:
    died = "The actor died unexpectedly before finishing this task.\n\tclass_name: ShardWorker\n\tpid: 3\n"
    why = "The actor is dead because its worker process has died."
    assert reason_of(RuntimeError(f"{died}{why}\n\tmore")) == why
    assert reason_of(RuntimeError("Failed to connect.\nTraceback\n  File")) == "Failed to connect."
    assert reason_of(RuntimeError()) == "RuntimeError"
    assert reason_of(RuntimeError(f"It died. There are some potential root causes. {'x' * 300}")) == ("It died.")


def test_a_cluster_of_before_is_left_with_one_word(job: Job) -> None:
    tree = yaml.safe_load(job.path.read_text())
    job.path.write_text(yaml.safe_dump({**tree, "engine": {"name": "ray", "address": "127.0.0.1:1"}}))
    assert main(["warmup", str(job.path), "--engine", "local"]) == 0
    assert read_config(job.run_dir / "config.yaml", []).engine == EngineSection()


SIGNALLED = """
import os, signal, sys, time
from gradpursuit import cli
from gradpursuit.cluster import connected
from gradpursuit.config import EngineSection

def verb(arguments, overrides):
    with connected(EngineSection(name="ray", workers=1)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

cli.status = verb
sys.exit(cli.main(["status", "x"]))
"""


def test_a_driver_that_is_asked_to_end_says_so_and_leaves_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        130,
        "gradpursuit: interrupted; the same command goes on where it stopped",
    )


def test_places_that_nothing_reaches_are_told() -> None:
    with pytest.raises(ConfigError, match="gopher"):
        place("gopher://host/folder")
    assert place("relative/folder") == Path("relative/folder")
