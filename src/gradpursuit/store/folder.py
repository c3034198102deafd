"""The shards of one store as any process reads and writes them: small to send, and without the ids of the rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gradpursuit.errors import StoreError
from gradpursuit.files import exists
from gradpursuit.store.encoding import DTYPES, SCALED, encode, misfits
from gradpursuit.store.shards import COLUMNS, Columns, Shard, ShardError, read_columns, read_shard, write_shard

logger = logging.getLogger("gradpursuit")


class ShardState(NamedTuple):
    """What was found of one shard; `reason` says what is wrong with one that is missing or broken."""

    state: Literal["missing", "whole", "broken"]
    reason: str = ""


@dataclass(frozen=True)
class ShardFolder:
    """Where the shards of a store lie, and what each of them must be.

    Attributes:
        folder: of the store.
        fingerprint, parts: of its spec; the parts without the ids.
        rows: N. shard_rows, checkpoints, dim, dtype: as in :class:`StoreSpec`.
    """

    folder: Path
    fingerprint: str
    parts: Mapping[str, Any]
    rows: int
    shard_rows: int
    checkpoints: int
    dim: int
    dtype: str

    def range(self, shard: int) -> range:
        """The rows of one shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def path(self, checkpoint: int, shard: int) -> Path:
        """Where shard `shard` of checkpoint `checkpoint` (both from 0) lies."""
        return self.folder / f"checkpoint-{checkpoint + 1}" / f"shard-{shard:05d}.safetensors"

    def state(self, checkpoint: int, shard: int) -> ShardState:
        """Whether that shard is missing, whole (there, and unchanged since it was written) or broken."""
        if not exists(self.path(checkpoint, shard)):
            return ShardState("missing", "not there")
        try:
            self.read(checkpoint, shard, verify=True)
        except ShardError as error:
            return ShardState("broken", error.reason)
        return ShardState("whole")

    def has(self, checkpoint: int, shard: int) -> bool:
        """Whether that shard is whole; a broken one is logged, as the caller will compute it again."""
        found = self.state(checkpoint, shard)
        if found.state == "broken":
            logger.warning("%s: %s; computed again", self.path(checkpoint, shard), found.reason)
        return found.state == "whole"

    def write(self, checkpoint: int, shard: int, content: Shard) -> None:
        """Encode and write one shard of float32 features, atomically.

        Raises:
            StoreError: a row is not finite, all zeros or does not fit the store's type, or the rows and the dropped
                ones are not those of the shard; nothing is written.
            RunError: the disk is full.
        """
        self._check(checkpoint, shard, content)
        self._check_features(checkpoint, shard, content, np.dtype(np.float32))
        path = self.path(checkpoint, shard)
        _refuse(path, content, ~np.isfinite(content.features).all(axis=1), "not finite", "drop them with their reason")
        _refuse(path, content, ~content.features.any(axis=1), "all zeros", "drop them with their reason")
        block = encode(content.features, self.dtype)
        outside = f"outside the range of {self.dtype}"
        _refuse(path, content, misfits(block), outside, "use gradients.store_dtype: float32 or float16")
        self.rewrite(checkpoint, shard, replace(content, features=block.values, scale=block.scale))

    def rewrite(self, checkpoint: int, shard: int, content: Shard) -> None:
        """Write one shard whose features are encoded already, atomically."""
        write_shard(self.path(checkpoint, shard), content, self.fingerprint, self.parts, checkpoint)

    def read(self, checkpoint: int, shard: int, *, verify: bool = False) -> Shard:
        """One shard, its features and scale as stored: memory-mapped on a disk, in memory from elsewhere.

        Raises:
            StoreError: it is missing, broken or foreign.
        """
        path = self.path(checkpoint, shard)
        content = read_shard(path, self.fingerprint, self.parts, checkpoint, verify=verify)
        self._check(checkpoint, shard, content)
        self._check_features(checkpoint, shard, content, DTYPES[self.dtype])
        if (content.scale is None) == (self.dtype in SCALED):
            raise ShardError(path, f"its {self.dtype} features and their scale do not belong together")
        return content

    def columns(self, checkpoint: int, shard: int) -> Columns:
        """What one shard says of its rows; its features are not read.

        Raises:
            StoreError: it is missing, broken or foreign.
        """
        content = read_columns(self.path(checkpoint, shard), self.fingerprint, self.parts, checkpoint)
        self._check(checkpoint, shard, content)
        return content

    def _check(self, checkpoint: int, shard: int, content: Columns | Shard) -> None:
        """The rows and the dropped ones must be that shard's."""
        rows, path = self.range(shard), self.path(checkpoint, shard)
        present, n = content.row.tolist(), len(content.row)
        if any(getattr(content, name).shape != (n,) for name in COLUMNS) or sorted(present) != present:
            raise ShardError(path, "its columns are not n rows in ascending order")
        if sorted([*present, *content.dropped]) != list(rows):
            raise ShardError(path, f"it holds other rows than {rows.start}-{rows.stop - 1}")

    def _check_features(self, checkpoint: int, shard: int, content: Shard, dtype: np.dtype[Any]) -> None:
        """The features must have the shape of the spec, and be of `dtype`."""
        n, path = len(content.row), self.path(checkpoint, shard)
        if content.features.shape != (n, self.dim) or content.features.dtype != dtype:
            raise ShardError(
                path,
                f"its features are {content.features.dtype} {content.features.shape}, expected {dtype} {(n, self.dim)}",
            )
        if content.scale is not None and content.scale.shape != (n,):
            raise ShardError(path, f"its scale has shape {content.scale.shape}, expected {(n,)}")


def _refuse(path: Path, content: Shard, bad: Any, what: str, mend: str) -> None:
    if bad.any():
        first = content.row[bad][:5].tolist()
        raise StoreError(f"{path}: {int(bad.sum())} rows are {what} (first: {first}); {mend}")
