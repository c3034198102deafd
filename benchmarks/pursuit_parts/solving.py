"""One matching problem, the solvers of this process, and what a solution is worth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpursuit.pursuit import GradientMatrix, GradientTrajectoryPursuit, NonNegativeOMP

ALPHA = 0.3


@dataclass(frozen=True)
class Problem:
    """A [D, N] with unit columns, as a matrix of the package or rows [N, D] in memory, and b [D]."""

    matrix: GradientMatrix
    target: NDArray[np.float64]

    @cached_property
    def mean_square(self) -> float:
        """The mean squared norm of the atoms: the ridge λ is alpha times this."""
        return float(self.matrix.squared_norms().mean())

    def quality(
        self, support: NDArray[np.int64], weights: NDArray[np.float64], alpha: float = ALPHA
    ) -> dict[str, float]:
        """‖A w − b‖/‖b‖, and ½‖A w − b‖² + ½λ‖w‖² relative to ½‖b‖², both in float64."""
        r, unit = self.target - self.matrix.combine(support, weights), float(self.target @ self.target)
        ridge = alpha * self.mean_square
        return {
            "residual": float(np.sqrt(r @ r / unit)),
            "objective": float((r @ r + ridge * (weights @ weights)) / unit),
        }


def fitted(estimator: Any, X: Any, y: NDArray[np.float64]) -> tuple[Any, float]:
    """The fitted estimator and its seconds."""
    begin = time.perf_counter()
    estimator.fit(X, y)
    return estimator, time.perf_counter() - begin


def described(estimator: Any, seconds: float, problem: Problem) -> dict[str, Any]:
    """What one of the package's pursuits found: the quality is that of its first layer, a solution of its own."""
    first = estimator.support_[estimator.layers_ == 1]
    return {
        "seconds": seconds,
        "atoms": len(estimator.support_),
        "layers": np.bincount(estimator.layers_)[1:].tolist(),
        **problem.quality(first, estimator.coef_[first]),
        "kkt": float(estimator.kkt_),
        "passes": int(estimator.n_iter_),
        "stop_reason": list(estimator.stop_reason_),
    }


def compile_kernels() -> None:
    """See that nothing is compiled while something is timed: pursuits small and large on arrays."""
    rows = np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32)
    for k in (8, 700):  # refits by Gram matrix, and without one
        GradientTrajectoryPursuit(k).fit(rows.T, rows[0].astype(np.float64))
    NonNegativeOMP(2).fit(rows.T, rows[0].astype(np.float64))


_START = """
import time
begin = time.perf_counter()
import numpy as np
numpy_ready = time.perf_counter()
from gradpursuit.pursuit import GradientTrajectoryPursuit
ready = time.perf_counter()
rows = np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32)
seconds = []
for _ in range(2):
    start = time.perf_counter()
    GradientTrajectoryPursuit({k}).fit(rows.T, rows[0].astype(np.float64))
    seconds.append(time.perf_counter() - start)
print(ready - numpy_ready, *seconds)
"""


def start_up() -> dict[str, float]:
    """Seconds of a fresh process: the import (without NumPy's), and what a first fit takes longer than the next."""
    found = {}
    for name, k in (("small budget", 8), ("large budget", 700)):
        done = subprocess.run([sys.executable, "-c", _START.format(k=k)], capture_output=True, text=True, check=True)
        imported, first, second = map(float, done.stdout.split())
        found["import"] = imported
        found[f"first fit beyond the second, {name}"] = first - second
    return found


class PeerError(Exception):
    """A peer's script failed; with the end of what it wrote."""


@dataclass(frozen=True)
class Peer:
    """A peer's script, its arguments, and the interpreter of its environment."""

    name: str
    script: str
    interpreter: str
    extra: tuple[str, ...] = ()

    def climb(self, folder: Path, k: int, limit: float, threads: int) -> dict[str, Any]:
        """Its times up to k on the problem in `folder` (`save_problem`); raises :class:`PeerError`."""
        script = Path(__file__).parent.parent / "peers" / self.script
        with tempfile.TemporaryDirectory() as out:
            path = Path(out) / "out.json"
            command = [self.interpreter, script, folder / "features.npy", folder / "target.npy", path, "--k", str(k)]
            command += ["--limit", str(limit), "--threads", str(threads), *self.extra]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise PeerError(f"{self.name} failed:\n{done.stderr[-3000:]}")
            found: dict[str, Any] = json.loads(path.read_text())
            return found


def save_problem(folder: Path, rows: NDArray[np.float32], target: NDArray[np.float64]) -> None:
    """For the peers: features.npy float32 [N, D] and target.npy float32 [D]."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "features.npy", rows)
    np.save(folder / "target.npy", target.astype(np.float32))


def threads() -> int:
    """As many as BLAS and the kernels are allowed here."""
    import numba

    return min(
        int(numba.config.NUMBA_NUM_THREADS), int(os.environ.get("OMP_NUM_THREADS", numba.config.NUMBA_NUM_THREADS))
    )
