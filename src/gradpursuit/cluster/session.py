"""The connection to Ray: a cluster at an address, or one of this machine alone, which nothing else can reach."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from gradpursuit.cluster.errors import reason_of
from gradpursuit.config import EngineSection
from gradpursuit.errors import ConfigError, RunError

logger = logging.getLogger("gradpursuit")

# Results and residuals pass through Ray's store, features never do.
_OBJECT_STORE = 256 * 2**20
_CONNECTING = 10.0  # seconds that the head of a cluster may take to accept a connection, and to answer
# What a client of HTTP/2, which Ray speaks, says first, with no settings (type 4) of its own; a server tells its own.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_SETTINGS = 4
# Ray reads these when it is imported, and hands them to every process that it starts here.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its name for: every node of this machine has the address 127.0.0.1
}


@dataclass(frozen=True)
class Resources:
    """What one worker takes of its node."""

    cpus: int
    gpus: int = 0


class Session:
    """A connection. `engine`: how it was asked for."""

    def __init__(self, engine: EngineSection) -> None:
        self.engine = engine

    def room(self, resources: Resources) -> int:
        """How many workers the nodes that are there now have room for, if nothing else runs there."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(int(min(node.get("CPU", 0) // resources.cpus, *_gpu_room(node, resources.gpus))) for node in nodes)

    def has_gpus(self) -> bool:
        """Whether any node has one."""
        import ray

        return ray.cluster_resources().get("GPU", 0) > 0

    def workers(self, resources: Resources) -> int:
        """How many workers there are to be now: as many as there is room for, and not more than are configured.

        Raises:
            ConfigError: there is room for none.
        """
        room = self.room(resources)
        wanted = self.engine.workers or room
        if not room:
            raise ConfigError(
                f"engine.cpus = {resources.cpus}: no node of the cluster has room for a worker of so many cores"
                + (f" and {resources.gpus} GPU" if resources.gpus else "")
                + "; ask for fewer cores"
            )
        if wanted > room:
            logger.warning("engine.workers = %d, but there is room for %d now", wanted, room)
        return min(wanted, room)


def _gpu_room(node: dict[str, float], gpus: int) -> list[float]:
    return [node.get("GPU", 0) // gpus] if gpus else [float("inf")]


@contextmanager
def connected(engine: EngineSection) -> Iterator[Session]:
    """Be connected to Ray as `engine` says: to `engine.address`, or to a cluster of this machine started for the block.

    A connection that is there already is used, and left.

    Raises:
        ConfigError: Ray is not installed.
        RunError: the cluster cannot be reached, or does not let us in.
    """
    if engine.address is None:
        local_only()
    require_ray()
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        yield Session(engine)
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if engine.address is None:
        # "local": a new one, where an address left out would mean whatever cluster runs here already.
        options.update(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE, num_cpus=_cores())
        logger.info("starting Ray on this machine")
    else:
        options.update(address=engine.address)
        require_listening(engine.address)
        logger.info("connecting to the Ray cluster at %s", engine.address)
    try:
        with _sigterm_kept():
            ray.init(**options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        ray.shutdown()  # of what was there before it failed
        raise _unreachable(engine.address or "this machine", reason_of(error) + _token_note(engine)) from None
    try:
        yield Session(engine)
    finally:
        ray.shutdown()


def _cores() -> int | None:
    """The cores that this process was given (by SLURM, taskset); None: all that Ray finds."""
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return given if given != os.cpu_count() else None


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Ray puts a handler of its own into its driver, which ends it where it stands."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _token_note(engine: EngineSection) -> str:
    """What may be wrong where no token is sent: Ray sends none to an address by itself."""
    if engine.address in (None, "auto") or "RAY_AUTH_MODE" in os.environ:
        return ""
    return (
        " (a cluster whose nodes had a token in ~/.ray/auth_token or RAY_AUTH_TOKEN when they started asks for it: set "
        "RAY_AUTH_MODE=token to send yours)"
    )


def require_listening(address: str) -> None:
    """Refuse an address (host:port) where no Ray listens, for which Ray itself would wait up to twenty minutes.

    Raises:
        RunError: nobody does, or something else.
    """
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECTING) as opened:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return  # it would not answer in the clear
            opened.sendall(_HELLO)
            answer = opened.recv(9)
    except TimeoutError:
        raise _unreachable(address, f"no answer in {_CONNECTING:.0f} s") from None
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from None
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise _unreachable(address, "something else than Ray listens there")


def _unreachable(where: str, why: str) -> RunError:
    return RunError(
        f"no Ray cluster can be reached at {where}: {why}; look at `ray status` there (this machine must be one of its "
        "nodes), or give --address null to start one on this machine"
    )


def local_only() -> None:
    """See that a cluster started by this process listens on 127.0.0.1 alone; to be called before Ray is imported.

    Raises:
        ConfigError: Ray was imported already, with another setting.
    """
    late = "ray" in sys.modules and os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") != "0"
    if late and not sys.modules["ray"].is_initialized():
        raise ConfigError(
            "Ray was imported before gradpursuit could keep it on 127.0.0.1; set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 "
            "in the environment, or connect it yourself with ray.init() first"
        )
    if not late:
        os.environ.update(_ENVIRONMENT)


def require_ray() -> None:
    """Refuse to go on without Ray.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("ray") is None:
        raise ConfigError(
            "engine.name = ray, but Ray is not installed; pip install 'gradpursuit[ray]', or leave --engine ray out to "
            "run on this machine alone"
        )
