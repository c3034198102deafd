"""`scale`: one pursuit of rows on disk, as large as the method's paper has it, beside reading them and beside CORDS."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpursuit.pursuit import GradientMatrix, GradientTrajectoryPursuit, TrajectoryMatrix

from .growth_law import extrapolate, spans_of
from .solving import ALPHA, Peer, Problem, compile_kernels, described, fitted, save_problem, threads
from .synthetic import DiskFeatures, LowRank

SPEEDUP, BANDWIDTH, PASSES = 1717.0, 0.6, 3.0  # what is aimed at
BUFFER = 4 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, required=True, help="for the rows, on the disk to be measured")
    parser.add_argument("--rows", type=int, default=270_000)
    parser.add_argument("--dim", type=int, default=32_768, help="of two checkpoints together")
    parser.add_argument("--budget", type=int, default=13_500)
    parser.add_argument("--rounds", type=int, default=3, help="of reading")
    parser.add_argument("--cold", action="store_true", help="evict the rows before every pass: all are read from disk")
    parser.add_argument("--keep", action="store_true", help="leave the rows on disk for the next time")
    parser.add_argument("--cords", metavar="PYTHON", help="interpreter of CORDS' environment (peers/setup.sh)")
    parser.add_argument("--slice", type=int, default=4096, help="rows, all dimensions, that CORDS is measured on")
    parser.add_argument("--slice-k", type=int, default=1024, help="atoms up to which it is measured, if time allows")
    parser.add_argument("--limit", type=float, default=300.0, help="most seconds of one solve of CORDS")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    half = arguments.dim // 2
    source = LowRank(arguments.dim)
    store = DiskFeatures(arguments.folder, arguments.rows, (half, arguments.dim - half))
    found: dict[str, Any] = {"N": arguments.rows, "D": arguments.dim, "k": arguments.budget, "bytes": store.nbytes}
    found |= source.described()
    if store.complete():
        print(f"the rows in {store.folder} are used again")
    else:
        begin = time.perf_counter()
        store.write(source)
        print(f"{store.nbytes / 1e9:.2f} GB written in {time.perf_counter() - begin:.0f} s", flush=True)
    try:
        found |= pursue(store, source.target(), arguments)
        if arguments.cords:
            found["cords"] = cords(store, source.target(), found, arguments)
    finally:
        if not arguments.keep:
            store.delete()
    return found


class TimedMatrix:
    """A matrix that keeps the seconds of everything it is asked for.

    prepare: called before every pass; what that takes is kept apart, as "preparing".
    """

    def __init__(self, matrix: GradientMatrix, prepare: Callable[[], None]) -> None:
        self._matrix, self._prepare = matrix, prepare
        self.seconds: dict[str, list[float]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(D, N)."""
        return self._matrix.shape

    @property
    def nbytes(self) -> int:
        """Bytes that one pass reads."""
        return self._matrix.nbytes

    def correlate(self, r: Any) -> Any:
        """A^T r."""
        return self._timed("correlate", r)

    def columns(self, ids: Any) -> Any:
        """Atoms."""
        return self._timed("columns", ids)

    def combine(self, ids: Any, x: Any) -> Any:
        """Sum of atoms."""
        return self._timed("combine", ids, x)

    def squared_norms(self) -> Any:
        """Squared norms; the first call is a pass."""
        return self._timed("squared_norms")

    def _timed(self, name: str, *given: Any) -> Any:
        begin = time.perf_counter()
        if name == "correlate" or (name == "squared_norms" and name not in self.seconds):
            self._prepare()
            ready = time.perf_counter()
            self.seconds.setdefault("preparing", []).append(ready - begin)
            begin = ready
        result = getattr(self._matrix, name)(*given)
        self.seconds.setdefault(name, []).append(time.perf_counter() - begin)
        return result


def pursue(store: DiskFeatures, target: NDArray[np.float64], arguments: argparse.Namespace) -> dict[str, Any]:
    """GTP on the store, timed, between two measurements of reading."""
    compile_kernels()
    few = TrajectoryMatrix([[shards[0][:64]] for shards in store.blocks()])
    fitted(GradientTrajectoryPursuit(1), few, target)  # compiles what reads float16
    blocks = store.blocks()
    matrix = TrajectoryMatrix(blocks)
    if not arguments.cold:
        matrix.correlate(target)  # brings into memory what fits there

    def prepare() -> None:
        if arguments.cold:
            store.evict(blocks)

    before = bandwidth(store, matrix, target, arguments.rounds, prepare)
    timed = TimedMatrix(TrajectoryMatrix(blocks), prepare)
    with memory() as peak:
        solver, seconds = fitted(GradientTrajectoryPursuit(arguments.budget, alpha=ALPHA), timed, target)
    after = bandwidth(store, matrix, target, 1, prepare)
    seconds -= sum(timed.seconds.pop("preparing"))
    passes = timed.seconds["correlate"]
    norms = timed.seconds["squared_norms"][0]
    made = {
        "cold": arguments.cold,
        "gtp": described(solver, seconds, Problem(matrix, target)),
        "seconds_of": {name: sum(values) for name, values in timed.seconds.items()},
        "every_pass_seconds": passes,
        "norms_pass_seconds": norms,
        "solve_over_passes": seconds / (sum(passes) + norms),
        "solve_over_correlate": seconds / sum(passes),
        "GB/s": {
            "before": before,
            "after": after,
            "passes of the pursuit": statistics.median(store.nbytes / s / 1e9 for s in passes),
        },
        "memory_bytes": peak,
        "steps": [step._asdict() for step in solver.steps_],
    }
    made["bandwidth_share"] = before["share"]
    tell(made)
    return made


def bandwidth(
    store: DiskFeatures,
    matrix: GradientMatrix,
    target: NDArray[np.float64],
    rounds: int,
    prepare: Callable[[], None],
) -> dict[str, float]:
    """GB/s of reading the files with one thread and with several, and of a pass, in turn; medians.

    prepare: called before each, untimed. share: the pass as a share of the faster way of reading, median of the ratios
    of each round.
    """
    paths = [path for shards in store.paths() for path in shards]

    def read(path: Path) -> None:
        buffer = bytearray(BUFFER)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def by_threads() -> None:
        with ThreadPoolExecutor(threads()) as pool:
            list(pool.map(read, paths))

    ways: dict[str, Callable[[], Any]] = {
        "readinto, one thread": lambda: [read(path) for path in paths],
        f"readinto, {threads()} threads": by_threads,
        "correlate": lambda: matrix.correlate(target),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            prepare()
            begin = time.perf_counter()
            way()
            speeds[name].append(store.nbytes / (time.perf_counter() - begin) / 1e9)
    *reading, correlate = speeds.values()
    shares = [c / max(reads) for c, *reads in zip(correlate, *reading, strict=True)]
    return {name: statistics.median(values) for name, values in speeds.items()} | {"share": statistics.median(shares)}


@contextmanager
def memory() -> Iterator[dict[str, int]]:
    """Bytes of this process beyond mapped files (RssAnon): at the beginning, and the most seen, every 20 ms."""
    found = {"begin": resident(), "peak": 0}
    done = Event()

    def watch() -> None:
        while not done.wait(0.02):
            found["peak"] = max(found["peak"], resident())

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found["beyond_begin"] = found["peak"] - found["begin"]


def resident() -> int:
    """Resident bytes that are not of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def tell(made: dict[str, Any]) -> None:
    gtp, speeds = made["gtp"], made["GB/s"]
    print(f"GTP: {gtp['seconds']:.1f} s, {gtp['passes']} passes, {gtp['atoms']} atoms, {gtp['stop_reason']}")
    print(f"     relative residual {gtp['residual']:.5f}, objective {gtp['objective']:.6f}, KKT {gtp['kkt']:.1e}")
    print("     " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in made["seconds_of"].items()))
    ratio = made["solve_over_passes"]
    print(
        f"solve / passes {ratio:.2f} (target {PASSES:g}; without the pass for norms {made['solve_over_correlate']:.2f})"
    )
    for when in ("before", "after"):
        named = [f"{name} {speed:.2f}" for name, speed in speeds[when].items() if name != "share"]
        print(f"GB/s {when}: " + ", ".join(named))
    print(f"passes within the pursuit: {speeds['passes of the pursuit']:.2f} GB/s")
    where = "disk's" if made["cold"] else "files'"
    print(f"a pass reads at {made['bandwidth_share']:.0%} of the {where} bandwidth (target {BANDWIDTH:.0%})")
    print(f"memory beyond files: {made['memory_bytes']['peak'] / 2**30:.2f} GiB at most", flush=True)


def cords(
    store: DiskFeatures, target: NDArray[np.float64], found: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Seconds that CORDS would take, computed from its times at small k on the first rows, all dimensions.

    Only the products with all rows depend on N: they are one cost per iteration, and scaled with it. What an iteration
    costs beside them grows with the atoms chosen so far (copying them, their Gram matrix, solving it) at the same D.
    """
    count = min(arguments.slice, arguments.rows)
    folder = arguments.folder / "slice"
    made: dict[str, Any] = {"rows": count, "D": arguments.dim}
    try:
        save_problem(folder, store.rows(count), target)
        for solver in ("numpy", "torch"):
            peer = Peer(f"CORDS, {solver}", "run_cords.py", arguments.cords, ("--ridge", "0", "--solver", solver))
            measured = peer.climb(folder, min(arguments.slice_k, count), arguments.limit, threads())
            made[solver] = computed(measured, count, found)
            tell_cords(measured["what"], made[solver], found)
    finally:
        for name in ("features.npy", "target.npy"):
            (folder / name).unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()
    return made


def computed(measured: dict[str, Any], count: int, found: dict[str, Any]) -> dict[str, Any]:
    """The time at full size, with what it was computed from."""
    rungs = {rung["k"]: rung["seconds"] for rung in measured["rungs"]}
    spans = spans_of(measured)
    made = extrapolate(spans, found["k"], found["N"] / count)
    for fitted_order in made["orders"].values():
        fitted_order["times_gtp"] = fitted_order["seconds"] / found["gtp"]["seconds"]
    stopped = any("stopped_by_itself" in rung for rung in measured["rungs"])
    named = {"what": measured["what"], "version": measured["version"]}
    return {**named, "measured": rungs, "spans": spans, "stopped_by_itself": stopped, **made}


def tell_cords(what: str, made: dict[str, Any], found: dict[str, Any]) -> None:
    print(f"CORDS {what}: " + ", ".join(f"k = {k}: {s:.2f} s" for k, s in made["measured"].items()))
    for order, fitted_order in made["orders"].items():
        used = " <- used" if order == made["order"] else ""
        predicted = fitted_order["error_of_last_predicted"]
        last = f"the last span predicted from the first ones to {predicted:+.0%}" if predicted is not None else ""
        ratio = f"{fitted_order['times_gtp']:,.0f} x GTP (target {SPEEDUP:,.0f})"
        at = f"k = {found['k']:,} of N = {found['N']:,} takes {fitted_order['seconds']:.3g} s (computed)"
        print(f"  if an iteration grows as k^{order}, {at}, {ratio};")
        print(f"    error at most {fitted_order['worst_relative_error']:.0%}, {last}{used}", flush=True)
