"""The gradient store: T checkpoints × N rows × d features in shards, complete only when every shard is there."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpursuit.errors import StoreError
from gradpursuit.files import read_json, require_space, write_json
from gradpursuit.store.shards import Shard, read_shard, write_shard

VERSION = 1


@dataclass(frozen=True)
class StoreSpec:
    """What a store holds and how its features were made; equal specs mean interchangeable rows.

    Attributes:
        ids: of the N rows, in order.
        checkpoints: T.
        dim: d.
        dtype: 'float32' or 'float16'.
        shard_rows: rows per shard, at most 4,096.
        origin: model, data, trajectory, preconditioner and projection, as JSON values.
    """

    ids: tuple[str, ...]
    checkpoints: int
    dim: int
    dtype: str
    shard_rows: int
    origin: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over everything above."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the features of the whole store."""
        return self.checkpoints * len(self.ids) * self.dim * np.dtype(self.dtype).itemsize

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {
            "version": VERSION,
            "rows": len(self.ids),
            "checkpoints": self.checkpoints,
            "dim": self.dim,
            "dtype": self.dtype,
            "shard_rows": self.shard_rows,
            "origin": self.origin,
            "ids": list(self.ids),
        }

    def shards(self) -> list[range]:
        """The rows of each shard."""
        n = len(self.ids)
        return [range(start, min(start + self.shard_rows, n)) for start in range(0, n, self.shard_rows)]


class GradientStore:
    """A store on disk. `create` starts or resumes one, `open` reads a complete one."""

    def __init__(self, folder: Path, spec: StoreSpec) -> None:
        self.folder, self.spec = folder, spec
        self._fingerprint = spec.fingerprint

    @classmethod
    def create(cls, folder: Path, spec: StoreSpec) -> GradientStore:
        """Start a store, or go on with the one that is there if it was begun with an equal spec.

        A store with another spec is deleted first: its rows mean something else.

        Raises:
            RunError: the disk cannot hold it.
        """
        store = cls(folder, spec)
        manifest = folder / "manifest.json"
        wanted = {**spec.to_json(), "fingerprint": store._fingerprint}
        if not manifest.is_file() or read_json(manifest) != json.loads(json.dumps(wanted)):
            shutil.rmtree(folder, ignore_errors=True)
            require_space(folder, spec.nbytes, "the gradient store")
            write_json(manifest, wanted)
        return store

    @classmethod
    def open(cls, folder: Path) -> GradientStore:
        """Open a store for reading.

        Raises:
            StoreError: it is not there, of another version, or its manifest does not match its fingerprint.
        """
        manifest = folder / "manifest.json"
        if not manifest.is_file():
            raise StoreError(f"{folder}: no gradient store; collect the gradients first")
        value = read_json(manifest)
        version = value.get("version") if isinstance(value, dict) else None
        if version != VERSION:
            raise StoreError(f"{manifest}: version {version!r}, this program reads {VERSION}")
        names = ("checkpoints", "dim", "dtype", "shard_rows", "origin")
        try:
            spec = StoreSpec(ids=tuple(value["ids"]), **{name: value[name] for name in names})
            intact = {**spec.to_json(), "fingerprint": value["fingerprint"]} == value
            intact = intact and value["fingerprint"] == spec.fingerprint
        except KeyError as error:
            raise StoreError(f"{manifest}: {error} is missing; collect the gradients again") from None
        except TypeError:
            intact = False
        if not intact:
            raise StoreError(f"{manifest}: was changed by hand; collect the gradients again")
        return cls(folder, spec)

    def path(self, checkpoint: int, shard: int) -> Path:
        """Where shard `shard` of checkpoint `checkpoint` (both from 0) lies."""
        return self.folder / f"checkpoint-{checkpoint + 1}" / f"shard-{shard:05d}.safetensors"

    def has(self, checkpoint: int, shard: int) -> bool:
        """Whether that shard is there, whole, and unchanged since it was written."""
        if not self.path(checkpoint, shard).is_file():
            return False
        try:
            self.read(checkpoint, shard, verify=True)
        except StoreError:
            return False
        return True

    def write(self, checkpoint: int, shard: int, content: Shard) -> None:
        """Write one shard, atomically.

        Raises:
            StoreError: a row is not finite or all zeros, or the rows are not those of the shard.
        """
        self._check(checkpoint, shard, content)
        write_shard(self.path(checkpoint, shard), content, self._fingerprint)

    def read(self, checkpoint: int, shard: int, *, verify: bool = False) -> Shard:
        """Memory-map one shard.

        Raises:
            StoreError: it is missing, broken or foreign.
        """
        content = read_shard(self.path(checkpoint, shard), self._fingerprint, verify=verify)
        self._check(checkpoint, shard, content)
        return content

    def _check(self, checkpoint: int, shard: int, content: Shard) -> None:
        """The content must be that shard's rows, in the shapes and the type of the spec."""
        rows = self.spec.shards()[shard]
        path, n = self.path(checkpoint, shard), len(rows)
        columns = (content.norm, content.loss, content.tokens, content.row)
        if any(column.shape != (n,) for column in columns) or content.row.tolist() != list(rows):
            raise StoreError(f"{path}: holds other rows than {rows.start}-{rows.stop - 1}")
        features = content.features
        if features.shape != (n, self.spec.dim) or features.dtype != np.dtype(self.spec.dtype):
            raise StoreError(
                f"{path}: features are {features.dtype} {features.shape}, expected {self.spec.dtype} "
                f"{(n, self.spec.dim)}"
            )

    def features(self, *, verify: bool = True) -> list[list[NDArray[Any]]]:
        """Memory-mapped features: for each checkpoint its shards `[n_s, d]`, in row order.

        Raises:
            StoreError: a shard is missing or broken; it is named.
        """
        return [
            [self.read(t, s, verify=verify).features for s in range(len(self.spec.shards()))]
            for t in range(self.spec.checkpoints)
        ]

    def column(self, name: str) -> NDArray[Any]:
        """`norm`, `loss` or `tokens` of every row: [T, N]."""
        shards = range(len(self.spec.shards()))
        return np.stack(
            [np.concatenate([getattr(self.read(t, s), name) for s in shards]) for t in range(self.spec.checkpoints)]
        )
