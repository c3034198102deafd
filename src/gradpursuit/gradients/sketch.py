"""A sparse Johnson-Lindenstrauss sketch R^p → R^d that never forms a p × d matrix.

Every coordinate goes to `nonzeros` rows of the sketch with random signs, scaled by 1/√nonzeros (Kane and Nelson,
arXiv 1012.1577), so that inner products are kept without bias, with a relative error of about 1/√d.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class SparseSketch:
    """The sketch of a model's trainable parameters.

    The rows and signs of a parameter depend on `seed` and its name alone: not on device, batch, order, or which
    other parameters there are. They come from raw PCG64 words, whose stream NumPy guarantees.

    Args:
        sizes: number of elements of each parameter, by name.
        dim: d, the rows of the sketch.
        nonzeros: rows that each coordinate goes to.
        seed: of the hash.
        device: where the sketch is kept and applied.
    """

    def __init__(
        self, sizes: Mapping[str, int], dim: int, nonzeros: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        self.sizes, self.dim, self.nonzeros, self.seed = dict(sizes), dim, nonzeros, seed
        self._matrices = {name: self._matrix(name, size).to(device) for name, size in sizes.items()}

    def describe(self) -> dict[str, Any]:
        """Name, seed, d, nonzeros and source size, for the header of a store."""
        return {
            "name": "sparse-jl",
            "seed": self.seed,
            "dim": self.dim,
            "nonzeros": self.nonzeros,
            "source_size": sum(self.sizes.values()),
        }

    def add(self, parameter: str, values: Tensor, out: Tensor) -> None:
        """Add the sketch of `values [B, *shape]` of one parameter to `out [d, B]` float32, in place."""
        columns = values.reshape(len(values), -1).t().contiguous()
        torch.addmm(out, self._matrices[parameter], columns, out=out)

    def _matrix(self, name: str, size: int) -> Tensor:
        """The sketch of one parameter, [d, size] in compressed sparse rows."""
        word = int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:8], "little")
        raw = np.random.PCG64(word).random_raw(size * self.nonzeros)
        rows = torch.from_numpy(((raw >> np.uint64(1)) % np.uint64(self.dim)).astype(np.int64))
        signs = torch.from_numpy((raw & np.uint64(1)).astype(np.float32) * 2 - 1) / self.nonzeros**0.5
        columns = torch.arange(size).repeat_interleave(self.nonzeros)
        matrix = torch.sparse_coo_tensor(
            torch.stack([rows, columns]), signs, (self.dim, size), check_invariants=False
        ).coalesce()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
            return matrix.to_sparse_csr()
