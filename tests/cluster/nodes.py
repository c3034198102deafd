"""Ray clusters of several nodes on this machine, reachable from it alone."""

from __future__ import annotations

from typing import Any

from ray.cluster_utils import Cluster

NODE: dict[str, Any] = {"num_cpus": 4, "object_store_memory": 100 * 2**20}


def start_cluster(nodes: int) -> Cluster:
    """A cluster without a dashboard, and without a connection to it."""
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(**NODE)
    return cluster
