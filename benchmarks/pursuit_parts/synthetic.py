"""Synthetic features: low rank plus noise, unit rows, in memory or on disk."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 1024  # rows that are made at a time, each chunk from a seed of its own
SHARD_ROWS = 4096
TARGETS = 48


@dataclass(frozen=True)
class LowRank:
    """Rows z F + noise e of length 1: z [rank] normal of mean 0.3 (gradients share a direction), e uniform.

    Factor j of F has weight 1/√j. Noise of 1 has the same energy as what is of low rank. The first rows are the same
    however many are made.
    """

    dim: int
    rank: int = 64
    noise: float = 1.0
    seed: int = 0

    def factors(self) -> NDArray[np.float32]:
        """F [rank, dim], scaled so that an entry of z F has variance 1."""
        F = np.random.default_rng([self.seed, 0]).standard_normal((self.rank, self.dim), dtype=np.float32)
        F /= np.sqrt(np.arange(1, self.rank + 1, dtype=np.float32))[:, None]
        return F / np.float32(np.sqrt((F**2).sum() / self.dim))

    def target(self) -> NDArray[np.float64]:
        """b [dim] of length 1: the mean of 48 rows whose z have mean 0.5."""
        b = self._rows(self.factors(), 1, TARGETS, 0.5).mean(axis=0, dtype=np.float64)
        return b / np.linalg.norm(b)

    def chunks(self, count: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, unit rows) until there are `count`; made by all processors, two chunks each at a time."""
        F, threads = self.factors(), os.cpu_count() or 1
        starts = list(range(0, count, CHUNK))

        def make(start: int) -> NDArray[np.float32]:
            rows = self._rows(F, 2 + start // CHUNK, CHUNK, 0.3)[: count - start]
            rows /= np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
            return rows

        with ThreadPoolExecutor(threads) as pool:
            for wave in range(0, len(starts), threads):
                part = starts[wave : wave + threads]
                yield from zip(part, pool.map(make, part), strict=True)

    def matrix(self, count: int) -> NDArray[np.float32]:
        """`count` rows [count, dim]."""
        out = np.empty((count, self.dim), np.float32)
        for start, rows in self.chunks(count):
            out[start : start + len(rows)] = rows
        return out

    def described(self) -> dict[str, Any]:
        """The parameters, for the results."""
        return {"rank": self.rank, "noise": self.noise, "seed": self.seed, "unit_rows": True, "targets": TARGETS}

    def _rows(self, F: NDArray[np.float32], stream: int, count: int, mean: float) -> NDArray[np.float32]:
        generator = np.random.default_rng([self.seed, stream])
        z = generator.standard_normal((count, self.rank), dtype=np.float32) + np.float32(mean)
        rows = generator.random((count, self.dim), dtype=np.float32)
        rows -= np.float32(0.5)
        rows *= np.float32(self.noise * np.sqrt(12.0))
        rows += z @ F
        return rows


@dataclass(frozen=True)
class DiskFeatures:
    """Features on disk: for each checkpoint shards of 4,096 rows, plain arrays of float16."""

    folder: Path
    count: int
    widths: tuple[int, ...]

    def paths(self) -> list[list[Path]]:
        """The files of each checkpoint, in row order."""
        shards = range(-(-self.count // SHARD_ROWS))
        return [[self.folder / f"checkpoint-{t}-{s:05d}.f16" for s in shards] for t in range(len(self.widths))]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return 2 * self.count * sum(self.widths)

    def complete(self) -> bool:
        """Whether the files are there."""
        paths = [path for shards in self.paths() for path in shards]
        return all(p.exists() for p in paths) and sum(p.stat().st_size for p in paths) == self.nbytes

    def write(self, source: LowRank) -> None:
        """Make the files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        cuts = np.cumsum((0, *self.widths))
        for shards in self.paths():
            for path in shards:
                path.unlink(missing_ok=True)
        for start, rows in source.chunks(self.count):  # shards are whole numbers of chunks
            for shards, left, right in zip(self.paths(), cuts[:-1], cuts[1:], strict=True):
                with shards[start // SHARD_ROWS].open("ab") as file:
                    rows[:, left:right].astype(np.float16).tofile(file)

    def blocks(self) -> list[list[NDArray[np.float16]]]:
        """The shards, memory-mapped."""
        return [
            [np.memmap(path, np.float16, "r").reshape(-1, width) for path in shards]
            for shards, width in zip(self.paths(), self.widths, strict=True)
        ]

    def evict(self, blocks: list[list[NDArray[np.float16]]]) -> None:
        """See that the next who reads the files, or `blocks` of them, reads from the disk.

        Pages that are mapped stay in memory, so that the mappings let go of them first.
        """
        for shards, paths in zip(blocks, self.paths(), strict=True):
            for shard, path in zip(shards, paths, strict=True):
                shard.base._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[union-attr]
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # what is not yet written cannot go
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def rows(self, count: int) -> NDArray[np.float32]:
        """The first `count` rows of all checkpoints [count, D]."""
        blocks = self.blocks()
        out = np.empty((count, sum(self.widths)), np.float32)
        for start in range(0, count, SHARD_ROWS):
            part = slice(start, min(start + SHARD_ROWS, count))
            shard = start // SHARD_ROWS
            out[part] = np.concatenate([shards[shard][: part.stop - start] for shards in blocks], axis=1)
        return out

    def delete(self) -> None:
        """Remove the files."""
        for shards in self.paths():
            for path in shards:
                path.unlink(missing_ok=True)
