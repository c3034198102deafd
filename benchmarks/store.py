"""How fast a pursuit reads its store, beside NumPy reading the same bytes.

    python benchmarks/store.py --json benchmarks/store.json

For every type and dimension a store of --gib GiB is written to a temporary folder (in the page cache, as it is during
a pursuit) and read, round after round, in turn by

* read:      NumPy, all bytes of all shards into one reused buffer, one thread: the fastest way to have read the bytes;
* fromfile:  `np.fromfile` of every shard, a new array each;
* memory:    as many threads as `correlate` has, summing the mapped bytes as 64-bit integers: what the memory yields;
* plain:     the pass as NumPy alone can do it, widening 64 MB at a time before the product (the first round only);
* correlate: `TrajectoryMatrix.correlate`, as the pursuit calls it.

Speeds are stored bytes per second, medians over the rounds. The bound is correlate at no less than half of the faster
of read and fromfile, by the median of the ratios of each round; the exit code is 1 where it is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np

from gradpursuit.features import TrajectoryFeatures
from gradpursuit.store import DTYPES, GradientStore, Shard, StoreSpec

SHARD_ROWS = 512
CHECKPOINTS = 2
BOUND = 0.5


def write_store(folder: Path, dim: int, dtype: str, nbytes: int) -> GradientStore:
    """A store of about `nbytes` bytes; its shards hold the same numbers, as only their bytes matter here."""
    shards = max(1, nbytes // (CHECKPOINTS * SHARD_ROWS * dim * DTYPES[dtype].itemsize))
    ids = tuple(map(str, range(shards * SHARD_ROWS)))
    store = GradientStore.create(folder, StoreSpec(ids, CHECKPOINTS, dim, dtype, SHARD_ROWS, {"data": "random"}))
    features = np.random.default_rng(0).standard_normal((SHARD_ROWS, dim), dtype=np.float32) * np.float32(1e-4)
    ones = np.ones(SHARD_ROWS, np.float32)
    for t in range(CHECKPOINTS):
        for s in range(shards):
            rows = np.arange(s * SHARD_ROWS, (s + 1) * SHARD_ROWS)
            store.write(t, s, Shard(features, ones, ones, ones.astype(np.int32), rows))
    return store


def readers(store: GradientStore, threads: int) -> dict[str, Callable[[], Any]]:
    """The ways of reading that are compared, by name."""
    paths = sorted(store.folder.rglob("*.safetensors"))
    buffer = np.empty(4 << 20, np.uint8)
    features = TrajectoryFeatures(store.features(verify=False))
    matrix = features.matrix()
    r = np.random.default_rng(1).standard_normal(matrix.shape[0])
    halves = np.split(r.astype(np.float32), CHECKPOINTS)
    maps = [np.asarray(block.values).view(np.uint8) for blocks in features.blocks for block in blocks]
    pool = ThreadPoolExecutor(threads)

    def read() -> None:
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def plain() -> None:
        for part, blocks in zip(halves, features.blocks, strict=True):
            for block in blocks:
                np.asarray(block.values).astype(np.float32, copy=False) @ part

    return {
        "read": read,
        "fromfile": lambda: [np.fromfile(path, np.uint8) for path in paths],
        "memory": lambda: list(pool.map(lambda m: int(m.view(np.uint64).sum()), maps)),
        "plain": plain,
        "correlate": lambda: matrix.correlate(r),
    }


def measure(store: GradientStore, rounds: int, threads: int) -> dict[str, Any]:
    """Speeds in GB/s, and correlate as a share of the others."""
    ways, nbytes = readers(store, threads), store.spec.nbytes
    for name, way in ways.items():  # pages are mapped, kernels compiled
        if name != "plain":
            way()
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds):
        for name, way in ways.items():
            if name == "plain" and round_:
                continue
            start = time.perf_counter()
            way()
            speeds[name].append(nbytes / (time.perf_counter() - start) / 1e9)
    numpy = [max(pair) for pair in zip(speeds["read"], speeds["fromfile"], strict=True)]
    found = {name: round(statistics.median(values), 2) for name, values in speeds.items()}
    for name, base in (("of_numpy", numpy), ("of_memory", speeds["memory"])):
        ratios = [a / b for a, b in zip(speeds["correlate"], base, strict=True)]
        found[name] = round(statistics.median(ratios), 2)
    return {"dtype": store.spec.dtype, "dim": store.spec.dim, "rows": len(store.spec.ids), "GB": nbytes / 1e9, **found}


def machine(threads: int) -> dict[str, Any]:
    """What was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "processors": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],  # above `threads`: others were at work, trust the ratios more than the speeds
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of each store")
    parser.add_argument("--dims", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where the temporary stores go; default: the system's")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    threads = int(numba.config.NUMBA_NUM_THREADS)
    results = []
    columns = ("read", "fromfile", "memory", "plain", "correlate", "of_numpy", "of_memory")
    print(f"{'dtype':9}{'d':>6}{'GB':>6}" + "".join(f"{name:>11}" for name in columns))
    for dim in options.dims:
        for dtype in options.dtypes:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                store = write_store(Path(folder) / "store", dim, dtype, int(options.gib * 2**30))
                result = measure(store, options.rounds, threads)
            results.append(result)
            row = "".join(f"{result[name]:11.2f}" for name in columns)
            print(f"{dtype:9}{dim:6}{result['GB']:6.2f}{row}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(threads), "results": results}, indent=2) + "\n")
    missed = [f"{r['dtype']} {r['dim']}" for r in results if r["of_numpy"] < BOUND]
    print(f"bound of {BOUND} of NumPy's reading: {'missed by ' + ', '.join(missed) if missed else 'held by all'}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
