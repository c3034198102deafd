"""Clusters of the pool, and how a budget is shared out among groups of rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def cluster_labels(embeddings: Array, count: int, seed: int) -> Indices:
    """The k-means cluster of every row [N] of `embeddings` [N, d], brought to unit length.

    One start; no more clusters than there are distinct rows.
    """
    from sklearn.cluster import KMeans

    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    count = min(count, len(np.unique(unit, axis=0)))
    labels: Indices = KMeans(count, n_init=1, random_state=seed).fit(unit).labels_.astype(np.int64)
    return labels


def proportional_shares(sizes: Indices, k: int) -> Indices:
    """k shared out in proportion to `sizes` [c]: largest remainders, ties in order.

    No share is above its size unless k is above their sum.
    """
    exact = k * sizes / sizes.sum()
    shares = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - shares), kind="stable")[: k - shares.sum()]
    shares[largest] += 1
    return shares


def interleaved(groups: Sequence[Sequence[int] | Indices]) -> tuple[Indices, Indices]:
    """The members of `groups` in one order whose beginnings hold of each group what is its share, and their groups.

    Returns:
        int64 [n] and int64 [n]. Within a group the order is kept.
    """
    placed = [
        ((rank + 0.5) / len(members), group, int(member))
        for group, members in enumerate(groups)
        for rank, member in enumerate(members)
    ]
    placed.sort(key=lambda one: one[:2])
    members, of = [member for _, _, member in placed], [group for _, group, _ in placed]
    return np.array(members, dtype=np.int64), np.array(of, dtype=np.int64)
