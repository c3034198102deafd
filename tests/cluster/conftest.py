"""A Ray cluster of two nodes on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from nodes import Cluster, start_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes, and this process connected to them."""
    import ray

    made = start_cluster(2)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()
