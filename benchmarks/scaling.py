"""How long a pass of the distributed pursuit takes against rows and workers, and what that means for a large cluster.

    python benchmarks/scaling.py --folder DISK --out scaling.json          # 1 GB on disk, two workers
    python benchmarks/scaling.py --folder DISK --nodes 64 --rows-there 10000000 --dim-there 32768

strong     the same rows on more workers. weak: the same rows for each worker
overhead   passes over next to no rows, on more workers than there are cores: what a pass costs beside reading
fits       whole pursuits with their residuals: one machine, exact on workers (the same answer), two-level
model      seconds of a pass = bytes of a worker / its bandwidth + overhead + overhead of a worker × workers; its three
           constants, none of them negative, are fitted to what was measured. With a bandwidth of the network, and as
           many passes and columns for each chosen row as the measured pursuit took, it says what passes on --nodes
           would take: that is computed, not measured, and without the driver's refits

Rows lie in the page cache, so bandwidth is that of memory and kernel, not of a disk.

All of Ray stays on 127.0.0.1. A worker has one thread, so workers beyond the cores share them: figures for more workers
than cores say nothing about scaling, and are used for the overhead alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pursuit_parts.synthetic import LowRank
from scipy.optimize import nnls

from gradpursuit.cluster import ClusterFeatures, RayGradientMatrix, Session, Team, connected, local_only, parts_of
from gradpursuit.config import EngineSection
from gradpursuit.features import TrajectoryFeatures
from gradpursuit.pursuit import GradientTrajectoryPursuit
from gradpursuit.pursuit.problem import JOIN
from gradpursuit.store import GradientStore, Shard, StoreSpec
from store import machine

CHECKPOINTS, SHARD_ROWS, DTYPE = 2, 1024, "float16"
PAIR, WIDE, COLUMN = 16, 8, 4  # bytes of a pair, of a number of the residual, of a number of a column
FEW = 256  # rows of the overhead
KINDS = {"strong": "strong", "weak": "weak", "rows_of_one": "fewer rows", "overhead": "next to none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the rows (default: a temporary one)")
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--dim", type=int, default=8_192, help="of both checkpoints together")
    parser.add_argument("--budget", type=int, default=600)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="of strong and weak scaling")
    parser.add_argument("--crowd", type=int, nargs="+", default=[1, 2, 4, 6], help="workers of the overhead")
    parser.add_argument("--parts", type=int, nargs="+", default=[2, 4, 8], help="of two-level pursuits")
    parser.add_argument("--rounds", type=int, default=7, help="passes that are timed, after one that is not")
    parser.add_argument("--rows-there", type=int, default=10_000_000)
    parser.add_argument("--dim-there", type=int, default=32_768)
    parser.add_argument("--budget-there", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--cores", type=int, default=2, help="of a node there that read side by side")
    parser.add_argument("--network", type=float, default=1.25e9, help="bytes a second of the driver's network")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    parser.add_argument("--page", type=Path, help="file for the figures as Markdown, as docs/scaling.md shows them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(Path(folder), arguments)
    found["model"] = predict(found, arguments)
    print(json.dumps(found["model"], indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.page:
        arguments.page.write_text(tables(found))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured."""
    source = LowRank(arguments.dim)
    store = write_store(folder / "rows", source, arguments.rows)
    most = max(*arguments.workers, *arguments.crowd)
    few = write_store(folder / "few", source, FEW, FEW // most)  # so that every worker owns some
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Any] = {"machine": {**machine(1), "cores_at_hand": cores}, **source.described()}
    found |= {"rows": arguments.rows, "dim": arguments.dim, "dtype": DTYPE, "budget": arguments.budget}
    with crowded(most), connected(EngineSection(name="ray")) as session:
        bench = Bench(session, source.target(), joining(arguments.budget), arguments.rounds)
        found["strong"] = [bench.passes(store, arguments.rows, count) for count in arguments.workers]
        share = arguments.rows // max(arguments.workers)
        found["weak"] = [bench.passes(store, share * count, count) for count in arguments.workers]
        found["rows_of_one"] = [bench.passes(store, arguments.rows // part, 1) for part in (4, 2)]
        found["overhead"] = [bench.passes(few, FEW, count) for count in arguments.crowd]
        found["fits"] = fits(session, store, source.target(), arguments)
    return found


@contextmanager
def crowded(workers: int) -> Iterator[None]:
    """A cluster of this machine alone with room for so many workers, even if there are fewer cores."""
    local_only()
    import ray

    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def joining(budget: int) -> int:
    """How many atoms a pass is asked for."""
    return max(1, round(JOIN * budget))


def write_store(folder: Path, source: LowRank, count: int, shard_rows: int = SHARD_ROWS) -> GradientStore:
    """`count` rows in a store of two checkpoints, each with half of the dimensions."""
    half = source.dim // CHECKPOINTS
    spec = StoreSpec(tuple(map(str, range(count))), CHECKPOINTS, half, DTYPE, shard_rows, {"data": "low rank"})
    store = GradientStore.create(folder, spec)
    for first, chunk in source.chunks(count):  # of 1,024 rows, as the largest shards are
        for start in range(0, len(chunk), shard_rows):
            rows = chunk[start : start + shard_rows]
            ones, number = np.ones(len(rows), np.float32), np.arange(first + start, first + start + len(rows))
            for t in range(CHECKPOINTS):
                part = np.ascontiguousarray(rows[:, t * half : (t + 1) * half])
                shard = Shard(part, ones, ones, ones.astype(np.int32), number)
                store.write(t, (first + start) // shard_rows, shard)
    return store


@dataclass(frozen=True)
class Bench:
    """Times passes: the residual out, the best `pairs` of every worker back."""

    session: Session
    target: np.ndarray
    pairs: int
    rounds: int

    def passes(self, store: GradientStore, rows: int, workers: int) -> dict[str, Any]:
        """Passes over the first `rows` rows on `workers` workers: seconds here, and of the slowest worker."""
        import ray

        team = Team.begin(self.session, workers)
        try:
            matrix = ClusterFeatures(team, parts_of(store.shards, np.arange(rows))).matrix()
            matrix.squared_norms()
            self._pass(matrix)  # kernels are compiled, pages are mapped
            before = ray.get([member.actor.timing.remote() for member in team.members])
            seconds = [self._pass(matrix) for _ in range(self.rounds)]
            after = ray.get([member.actor.timing.remote() for member in team.members])
        finally:
            team.close()
        spent = [{name: a[name] - b[name] for name in a} for a, b in zip(after, before, strict=True)]
        slowest = max(spent, key=lambda one: one["pass"])
        one = {
            "workers": workers,
            "rows": rows,
            "bytes_per_worker": matrix.nbytes / workers,
            "seconds": statistics.median(seconds),
            "all_seconds": seconds,
            "worker_seconds": slowest["pass"] / self.rounds,
            "reading_share": min(one["reading"] / one["pass"] for one in spent),
            "traffic_per_pass": matrix.traffic.describe()["passes"][-1],
        }
        print(
            f"{workers} workers, {rows} rows: {one['seconds']:.4f} s a pass, {one['worker_seconds']:.4f} s of a "
            f"worker, {one['reading_share']:.1%} of it reading and multiplying",
            flush=True,
        )
        return one

    def _pass(self, matrix: RayGradientMatrix) -> float:
        began = time.perf_counter()
        ids, _ = matrix.ranking(self.target, 1e-6).without(np.empty(0, dtype=np.int64)).next(self.pairs)
        assert len(ids)
        return time.perf_counter() - began


def fits(
    session: Session, store: GradientStore, target: np.ndarray, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One machine, exact on workers, and two-level with several parts: seconds, residuals, traffic."""
    k, settings = arguments.budget, {"alpha": 0.3}
    one = TrajectoryFeatures(store.features()).matrix()
    one.squared_norms()
    found = [solved("one machine", one, target, k, settings)]
    team = Team.begin(session, max(arguments.workers))
    features = ClusterFeatures(team, parts_of(store.shards, np.arange(arguments.rows)))
    try:
        features.matrix().squared_norms()
        found.append(solved("exact, on workers", features.matrix(), target, k, settings))
        same = found[0].pop("support") == found[1].pop("support")
        found[1]["same_support_as_one_machine"] = same
        for parts in arguments.parts:
            matrix, began = features.matrix(), time.perf_counter()
            ids = matrix.winners(target, min(k, 2 * -(-k // parts)), parts, settings)
            last = solved(f"two-level, {parts} parts", matrix.columns(ids), target, min(k, len(ids)), settings)
            del last["support"]
            last |= {"seconds": time.perf_counter() - began, "winners": len(ids)}
            last["residual_over_exact"] = last["relative_residual"] / found[1]["relative_residual"]
            found.append(last | told(matrix))
    finally:
        team.close()
    for line in found:
        print({name: value for name, value in line.items() if name != "passes"}, flush=True)
    return found


def solved(name: str, matrix: Any, target: np.ndarray, k: int, settings: dict[str, Any]) -> dict[str, Any]:
    """A pursuit of a matrix."""
    began = time.perf_counter()
    solver = GradientTrajectoryPursuit(k, **settings).fit(matrix, target)
    return {
        "name": name,
        "seconds": time.perf_counter() - began,
        "passes": solver.n_iter_,
        "relative_residual": float(solver.residual_path_[-1]),
        "support": solver.support_.tolist(),
        **(told(matrix) if isinstance(matrix, RayGradientMatrix) else {}),
    }


def told(matrix: RayGradientMatrix) -> dict[str, Any]:
    """What a matrix moved, in all."""
    traffic = matrix.traffic.describe()
    return {name: traffic[name] for name in ("bytes_out", "bytes_back", "pairs", "columns", "other_bytes")}


def predict(found: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The constants of the model, how far it is off what was measured, and a pass on the nodes asked about.

    Of passes over many rows only those in which every worker had a core are used.
    """
    cores = found["machine"]["cores_at_hand"]
    fair = [one for name in ("strong", "weak", "rows_of_one") for one in found[name] if one["workers"] <= cores]
    used = [*fair, *found["overhead"]]
    # Parts of a time are not negative; errors are relative, so that passes over next to no rows count too.
    shares = np.array([[one["bytes_per_worker"] / 1e9, 1.0, one["workers"]] for one in used])
    shares /= [[one["seconds"]] for one in used]
    constants, _ = nnls(shares, np.ones(len(used)))
    per_byte, base, per_worker = map(float, constants / [1e9, 1.0, 1.0])
    off = [float(modelled) - 1 for modelled in shares[: len(fair)] @ constants]
    there = arguments.rows_there * arguments.dim_there * 2 / arguments.nodes
    k, nodes = arguments.budget_there, arguments.nodes
    out, pairs = WIDE * arguments.dim_there * nodes, PAIR * joining(k) * nodes
    reading = there * per_byte / arguments.cores
    overhead = base + per_worker * nodes
    moving = (out + pairs) / arguments.network
    exact = found["fits"][1]
    columns = COLUMN * arguments.dim_there * exact["columns"] / found["budget"] * k
    a_pass = reading + overhead + moving
    return {
        "measured": {
            "bandwidth_of_a_worker": 1 / per_byte,
            "overhead_seconds": base,
            "overhead_seconds_per_worker": per_worker,
            "model_over_measured_minus_1": off,
            "least_reading_share": min(one["reading_share"] for one in fair),
        },
        "computed": {
            "assumed": {"network_bytes_per_second": arguments.network, "cores_of_a_node": arguments.cores},
            "rows": arguments.rows_there,
            "dim": arguments.dim_there,
            "nodes": nodes,
            "budget": k,
            "bytes_per_node": there,
            "seconds_reading": reading,
            "seconds_overhead": overhead,
            "bytes_out": out,
            "bytes_of_pairs": pairs,
            "seconds_out_and_pairs": moving,
            "seconds_of_a_pass": a_pass,
            "passes": exact["passes"],
            "bytes_of_columns": columns,
            "seconds_of_columns": columns / arguments.network,
            "seconds_of_passes_and_columns": exact["passes"] * a_pass + columns / arguments.network,
        },
    }


def tables(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    return "\n".join([*measured(found), "", *computed(found["model"]["computed"]), ""])


def measured(found: dict[str, Any]) -> Iterator[str]:
    """Lines about what was measured, and how well the model fits it."""
    here, fitted, fits = found["machine"], found["model"]["measured"], found["fits"]
    yield (
        f"**Measured** on {here['cores_at_hand']} core(s) of {here['processor']}: {found['rows']:,} rows of "
        f"{found['dim']:,} numbers ({found['dtype']}) in the page cache, one thread a worker; medians of "
        f"{len(found['strong'][0]['all_seconds'])} passes that ask every worker for {joining(found['budget'])} pairs."
    )
    yield from heading("", "workers", "rows", "seconds a pass", "GB/s of all", "reading and multiplying")
    for key, name in KINDS.items():
        for one in found[key]:
            rate = one["bytes_per_worker"] * one["workers"] / one["seconds"] / 1e9
            figures = f"{one['rows']:,} | {one['seconds']:.4f} | {rate:.2f} | {one['reading_share']:.1%}"
            yield f"| {name} | {one['workers']} | {figures} |"
    yield f"\nWhole pursuits of {found['budget']} rows, on {found['strong'][-1]['workers']} workers:"
    yield from heading("", "seconds", "passes", "relative residual", "MB out", "MB back")
    for one in fits:
        moved = " | ".join(f"{one.get(name, 0) / 1e6:.1f}" for name in ("bytes_out", "bytes_back"))
        fit = f"{one['seconds']:.2f} | {one['passes']} | {one['relative_residual']:.4f}"
        yield f"| {one['name']} | {fit} | {moved} |"
    yield (
        f"\nThe exact pursuit chose {'the same' if fits[1]['same_support_as_one_machine'] else 'OTHER'} rows as one "
        f"machine. The model: {fitted['bandwidth_of_a_worker'] / 1e9:.2f} GB/s a worker, "
        f"{fitted['overhead_seconds'] * 1e3:.1f} ms a pass and {fitted['overhead_seconds_per_worker'] * 1e3:.1f} ms a "
        f"worker; off by at most {max(map(abs, fitted['model_over_measured_minus_1'])):.0%} where each had a core."
    )


def computed(there: dict[str, Any]) -> Iterator[str]:
    """Lines about what the model says of the nodes asked about."""
    assumed = there["assumed"]
    yield (
        f"**Computed**, not measured: {there['rows']:,} rows of {there['dim']:,} numbers on {there['nodes']} nodes, "
        f"{there['budget']:,} to be chosen. Assumed: rows in memory ({there['bytes_per_node'] / 1e9:.1f} GB a node), "
        f"{assumed['cores_of_a_node']} cores of each reading side by side, "
        f"{assumed['network_bytes_per_second'] / 1e9:g} GB/s of network at the driver, as many passes and columns for "
        "each chosen row as above. The driver's refits come on top."
    )
    yield from heading("", "seconds")
    moved = f"{there['bytes_out'] / 1e6:.1f} MB of residuals out, {there['bytes_of_pairs'] / 1e6:.1f} MB of pairs back"
    all_of_them = f"{there['passes']} passes, and {there['bytes_of_columns'] / 1e9:.1f} GB of columns"
    for name, key in {
        "reading and multiplying": "reading",
        "calls and answers": "overhead",
        moved: "out_and_pairs",
        "**one pass**": "of_a_pass",
        all_of_them: "of_passes_and_columns",
    }.items():
        yield f"| {name} | {there[f'seconds_{key}']:.3g} |"


def heading(*names: str) -> Iterator[str]:
    """The first lines of a table."""
    yield f"\n| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"


if __name__ == "__main__":
    main()
