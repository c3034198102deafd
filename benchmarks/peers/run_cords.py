"""Time the OMP solver of CORDS, the one behind its GradMatch.

On a CPU its GradMatchStrategy calls `OrthogonalMP_REG` (NumPy, SciPy) with positive=True and lam=0, on a GPU
`OrthogonalMP_REG_Parallel` (torch) with the ridge that the user asked for; both are here, at any ridge.
"""

from __future__ import annotations

import time
from typing import Any

import pursuits


class Clock:
    """A least squares solver that notes when it is called, and for how many atoms.

    That is once in an iteration, and once more for each atom that the iteration takes out again; what those calls take
    is left out.
    """

    def __init__(self, lstsq: Any) -> None:
        self._lstsq, self._calls = lstsq, []

    def __call__(self, matrix: Any, *given: Any) -> Any:
        self._calls.append((len(matrix), time.perf_counter()))
        return self._lstsq(matrix, *given)

    def restart(self) -> None:
        self._calls.clear()

    def iterations(self) -> list[tuple[int, float]]:
        """(atoms, seconds) from each call to the next that has one atom more."""
        pairs = zip(self._calls[:-1], self._calls[1:], strict=True)
        return [(atoms, then - now) for (atoms, now), (more, then) in pairs if more == atoms + 1]


def main() -> None:
    parser = pursuits.arguments("CORDS")
    parser.add_argument("--ridge", type=float, default=0.0, help="absolute")
    parser.add_argument("--solver", choices=["numpy", "torch"], default="numpy")
    args = pursuits.parse(parser)
    import numpy as np
    from cords.selectionstrategies.helpers import omp_solvers

    np.seterr(all="warn")  # importing it makes every underflow an error, here and in what it calls
    features, b = np.load(args.features), np.load(args.target)
    settings = {"positive": True, "lam": args.ridge}

    def by_numpy(k: int) -> Any:
        return omp_solvers.OrthogonalMP_REG(features.T, b, nnz=k, **settings)

    def by_torch(k: int) -> Any:
        A, y = torch.from_numpy(features).T, torch.from_numpy(b)
        return omp_solvers.OrthogonalMP_REG_Parallel(A, y, nnz=k, **settings).numpy()

    if args.solver == "torch":
        import torch

        torch.set_num_threads(args.threads)
        clock = torch.linalg.lstsq = Clock(torch.linalg.lstsq)
    else:
        clock = omp_solvers.lstsq = Clock(omp_solvers.lstsq)

    def solve(k: int) -> Any:
        clock.restart()
        return by_torch(k) if args.solver == "torch" else by_numpy(k)

    solve(1)
    name = "OrthogonalMP_REG_Parallel" if args.solver == "torch" else "OrthogonalMP_REG"
    what = f"{name}(positive=True, lam={args.ridge:g}), float32"
    pursuits.write_result(args, "cords", what, pursuits.climb(solve, args.k, args.limit), clock.iterations())


if __name__ == "__main__":
    main()
