"""Time orthogonal-matching-pursuit-gpu on the CPU. Its weights may be negative, and it has no ridge.

Its default algorithm, `v0`, forms the N x N Gram matrix in every call; `naive` correlates with the columns instead.
Version 0.1.3 of `naive` finds wrong atoms for a single target on the CPU, so it is given the target twice.
"""

from __future__ import annotations

from typing import Any

import pursuits


def main() -> None:
    parser = pursuits.arguments("orthogonal-matching-pursuit-gpu")
    parser.add_argument("--algorithm", choices=["v0", "naive"], default="v0")
    args = pursuits.parse(parser)
    import numpy as np
    import torch
    from orthogonal_matching_pursuit_gpu import run_omp

    torch.set_num_threads(args.threads)
    # The layout that it asks for, so that making it is not timed.
    X = torch.from_numpy(np.load(args.features)).T.contiguous()
    y = torch.from_numpy(np.load(args.target)).repeat(2 if args.algorithm == "naive" else 1, 1)

    def solve(k: int) -> Any:
        # Not False for `naive`: that is taken for a Gram matrix and fails.
        settings = {"precompute": True if args.algorithm == "v0" else None, "normalize": False, "fit_intercept": False}
        return run_omp(X, y, k, alg=args.algorithm, **settings)[0].numpy()

    if args.algorithm == "naive":
        solve(1)
    what = f"run_omp(alg='{args.algorithm}'), float32"
    pursuits.write_result(args, "orthogonal-matching-pursuit-gpu", what, pursuits.climb(solve, args.k, args.limit))


if __name__ == "__main__":
    main()
