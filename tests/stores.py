"""A small store for tests: 7 rows of 6 elements at 2 checkpoints, in shards of 3."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gradpursuit.store import GradientStore, Shard, StoreSpec

SPEC = StoreSpec(tuple(f"id-{i}" for i in range(7)), 2, 6, "float32", 3, {"model": {"a": 1}, "eps": 1e-08})


def shard(spec: StoreSpec, checkpoint: int, number: int) -> Shard:
    rows = spec.shards()[number]
    rng = np.random.default_rng([checkpoint, number])
    return Shard(
        rng.standard_normal((len(rows), spec.dim), dtype=np.float32),
        rng.random(len(rows), dtype=np.float32) + 1,
        rng.random(len(rows), dtype=np.float32),
        rng.integers(1, 90, len(rows)).astype(np.int32),
        np.arange(rows.start, rows.stop, dtype=np.int64),
    )


def filled(folder: Path, spec: StoreSpec = SPEC) -> GradientStore:
    store = GradientStore.create(folder, spec)
    for t in range(spec.checkpoints):
        for s in range(len(spec.shards())):
            store.write(t, s, shard(spec, t, s))
    return store
