"""Beyond one machine, on Ray: gradients and the exact pursuit, with the answer of one machine.

Ray is an extra (`pip install 'gradpursuit[ray]'`): nothing here imports it before it is used. What computes gradients
is in :mod:`gradpursuit.cluster.collect`, so that the workers of a pursuit load no torch.
"""

from gradpursuit.cluster.matrix import ClusterFeatures, RayGradientMatrix, Traffic
from gradpursuit.cluster.session import Resources, Session, connected, local_only, require_listening, require_ray
from gradpursuit.cluster.shards import Part, parts_of
from gradpursuit.cluster.team import Team

__all__ = [
    "ClusterFeatures",
    "Part",
    "RayGradientMatrix",
    "Resources",
    "Session",
    "Team",
    "Traffic",
    "connected",
    "local_only",
    "parts_of",
    "require_listening",
    "require_ray",
]
