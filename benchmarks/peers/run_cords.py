"""Time the OMP solver of CORDS, the one behind its GradMatch.

On a CPU its GradMatchStrategy calls `OrthogonalMP_REG` (NumPy, SciPy) with positive=True and lam=0, on a GPU
`OrthogonalMP_REG_Parallel` (torch) with the ridge that the user asked for; both are here, at any ridge.
"""

from __future__ import annotations

from typing import Any

import pursuits


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
    solve = by_torch if args.solver == "torch" else by_numpy
    solve(1)
    name = "OrthogonalMP_REG_Parallel" if args.solver == "torch" else "OrthogonalMP_REG"
    what = f"{name}(positive=True, lam={args.ridge:g}), float32"
    pursuits.write_result(args, "cords", what, pursuits.climb(solve, args.k, args.limit))


if __name__ == "__main__":
    main()
