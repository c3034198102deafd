"""Beyond one machine, on Ray: gradients and the exact pursuit, with the answer of one machine.

Ray is an extra (`pip install 'gradpursuit[ray]'`): nothing here imports it before it is used.
"""

from gradpursuit.cluster.collect import ClusterFill
from gradpursuit.cluster.matrix import ClusterFeatures, RayGradientMatrix, Traffic
from gradpursuit.cluster.session import Resources, Session, connected, local_only
from gradpursuit.cluster.shards import Part, parts_of
from gradpursuit.cluster.team import Team

__all__ = [
    "ClusterFeatures",
    "ClusterFill",
    "Part",
    "RayGradientMatrix",
    "Resources",
    "Session",
    "Team",
    "Traffic",
    "connected",
    "local_only",
    "parts_of",
]
