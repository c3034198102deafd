"""A sparse Johnson-Lindenstrauss sketch R^p → R^d that never forms a p × d matrix and moves no element alone.

Every parameter is cut into pieces of d coordinates; a piece is multiplied by random signs, rotated by a random
offset, and added to the sketch. That is a count sketch whose hash shifts whole pieces: two coordinates of one
piece never meet, two of different pieces meet with probability 1/d, so that inner products are kept without bias and
with the variance (‖x‖²‖y‖² + ⟨x, y⟩²)/d of independent hashing at most (Charikar, Chen and Farach-Colton, 2002),
while memory is read and written in order. `nonzeros` such sketches, scaled by 1/√nonzeros, are added up, so
that every coordinate goes to that many rows (Kane and Nelson, arXiv 1012.1577).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradpursuit.gradients.layout import coordinates
from gradpursuit.gradients.loops import rotation_sketch


class SparseSketch:
    """The sketch of a model's trainable parameters.

    The signs and offsets of a parameter depend on `seed` and its name alone: not on device, batch, order, or which
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
        self._hashes = {
            name: self._hashed([f"{seed}:{name}:{repeat}" for repeat in range(nonzeros)], size, device)
            for name, size in sizes.items()
        }

    def describe(self) -> dict[str, Any]:
        """Name, seed, d, nonzeros and source size, for the header of a store."""
        return {
            "name": "rotation-count-sketch",
            "seed": self.seed,
            "dim": self.dim,
            "nonzeros": self.nonzeros,
            "source_size": sum(self.sizes.values()),
        }

    def add(self, parameter: str, values: Tensor, out: Tensor) -> None:
        """Add the sketch of `values [B, *shape]` float32 of one parameter to `out [B, d]` float32, in place."""
        flat = coordinates(values)
        signs, offsets = self._hashes[parameter]
        if out.device.type == "cpu":
            rotation_sketch(flat.contiguous().numpy(), signs.numpy(), offsets, out.numpy())
            return
        for row, places in zip(signs, offsets.tolist(), strict=True):
            for source, target in _runs(places, flat.shape[1], self.dim):
                out[:, target].addcmul_(flat[:, source], row[source])

    def _hashed(self, keys: list[str], size: int, device: torch.device | str) -> tuple[Tensor, NDArray[np.int64]]:
        """Signs [nonzeros, size] and offsets [nonzeros, pieces]."""
        found = [self._hash(key, size) for key in keys]
        return torch.stack([signs for signs, _ in found]).to(device), np.array([places for _, places in found])

    def _hash(self, key: str, size: int) -> tuple[Tensor, list[int]]:
        """Signs [size], scaled by 1/√nonzeros, and the offset of each piece."""
        generator = np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
        offsets = (generator.random_raw(-(-size // self.dim)) % np.uint64(self.dim)).tolist()
        words = generator.random_raw(-(-size // 64)).astype("<u8")
        bits = np.unpackbits(words.view(np.uint8), count=size, bitorder="little")
        signs = (torch.from_numpy(bits).float() * 2 - 1) / self.nonzeros**0.5
        return signs, offsets


def _runs(offsets: list[int], size: int, dim: int) -> Iterator[tuple[slice, slice]]:
    """Where unbroken runs of coordinates go: a rotated piece is two of them, as it wraps around at row `dim`."""
    for piece, offset in enumerate(offsets):
        start, stop = piece * dim, min((piece + 1) * dim, size)
        wrap = min(start + dim - offset, stop)
        yield slice(start, wrap), slice(offset, offset + wrap - start)
        if wrap < stop:
            yield slice(wrap, stop), slice(0, stop - wrap)
