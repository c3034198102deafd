"""A Ray cluster of two nodes, an S3 server and small runs, all on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gradpursuit.cluster import local_only
from server import Server

if TYPE_CHECKING:
    from nodes import Cluster

local_only()  # before any module imports Ray


class WithoutRay(pytest.Module):
    """A module that cannot be imported."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        pytest.skip("Ray is not installed: pip install 'gradpursuit[test]'", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip the modules here where Ray is missing."""
    missing = find_spec("ray") is None
    return WithoutRay.from_parent(parent, path=module_path) if missing else None  # type: ignore[no-any-return]


SECRET = "this-must-never-be-written-anywhere"


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of an empty bucket, which keeps versions, of a real S3 server; its address is in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "user")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="features")
        boto3.client("s3").put_bucket_versioning(Bucket="features", VersioningConfiguration={"Status": "Enabled"})
        yield "s3://features"
    server.stop()


@pytest.fixture(scope="session")
def cluster(s3: str) -> Iterator[Cluster]:
    """Two nodes that know the S3 server, and this process connected to them."""
    import ray
    from nodes import start_cluster

    made = start_cluster(2)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="session")
def server(s3: str) -> Iterator[Server]:
    """Runs the command line in processes of its own."""
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="session")
def secret() -> str:
    """The key of the S3 server."""
    return SECRET


@pytest.fixture
def printed(tmp_path: Path) -> Path:
    """Where a command prints."""
    return tmp_path / "printed.txt"
