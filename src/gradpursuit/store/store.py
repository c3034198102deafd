"""The gradient store: T checkpoints × N rows × d features in shards, complete only when every shard is there."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradpursuit.errors import RunError, StoreError
from gradpursuit.files import read_json, require_space, write_json
from gradpursuit.store.encoding import DTYPES, SCALED, Block, encode, misfits
from gradpursuit.store.shards import COLUMNS, Shard, ShardError, read_shard, write_shard
from gradpursuit.store.spec import VERSION, StoreSpec, differences

logger = logging.getLogger("gradpursuit")


class ShardState(NamedTuple):
    """What was found of one shard; `reason` says what is wrong with one that is missing or broken."""

    state: Literal["missing", "whole", "broken"]
    reason: str = ""


class Problem(NamedTuple):
    """Something that :meth:`GradientStore.verify` found: where, and what is wrong there."""

    path: Path
    reason: str


class GradientStore:
    """A store on disk. `create` starts or resumes one, `open` reads a complete one.

    A row that could not be computed is dropped: it is absent, never zero, and its reason is kept. All readers go by
    the rows that are kept, in order; every checkpoint must hold the same ones, which :meth:`exclude` sees to.
    """

    def __init__(self, folder: Path, spec: StoreSpec) -> None:
        self.folder, self.spec = folder, spec
        self._fingerprint = spec.fingerprint
        self._parts = {name: part for name, part in spec.parts().items() if name != "ids"}
        self._ranges = spec.shards()

    @classmethod
    def create(cls, folder: Path, spec: StoreSpec) -> GradientStore:
        """Start a store, or go on with the one that is there if it was begun with an equal spec.

        A store with another spec is deleted first, as its rows mean something else; the log says which part differs.
        A manifest that is lost or damaged is written again: shards know for themselves where they belong. Files of
        interrupted writes are removed.

        Raises:
            RunError: the disk cannot hold it.
        """
        store = cls(folder, spec)
        manifest = folder / "manifest.json"
        for part in [*folder.glob("*.part"), *folder.glob("checkpoint-*/*.part")]:
            logger.warning("%s: left by an interrupted write; removed", part)
            part.unlink()
        if manifest.exists():
            try:
                present = _read_spec(manifest)
            except (StoreError, RunError) as error:
                logger.warning("%s; it is written again, and the shards that fit it are kept", error)
            else:
                if present.fingerprint == store._fingerprint:
                    return store
                changed = "; ".join(differences(present.parts(), _plain(spec.parts())))
                logger.warning("%s: holds gradients made with other settings: %s; they are replaced", folder, changed)
                shutil.rmtree(folder)
        if not any(folder.glob("checkpoint-*/*.safetensors")):
            require_space(folder, spec.nbytes, "the gradient store")
        write_json(manifest, {**spec.to_json(), "fingerprint": store._fingerprint})
        return store

    @classmethod
    def open(cls, folder: Path, expected: Mapping[str, Any] | None = None) -> GradientStore:
        """Open a store for reading.

        Args:
            folder: of the store.
            expected: parts of its identity (see :meth:`StoreSpec.parts`) that it must have been made with; parts that
                are not named are not compared.

        Raises:
            StoreError: it is not there, of another version, its manifest does not match its fingerprint, or a part is
                not the expected one: that part is named with both values.
        """
        if not (folder / "manifest.json").is_file():
            raise StoreError(f"{folder}: no gradient store; collect the gradients first")
        spec = _read_spec(folder / "manifest.json")
        if expected is not None:
            wanted = _plain(expected)
            found = {name: part for name, part in spec.parts().items() if name in wanted}
            if changed := list(differences(found, wanted)):
                raise StoreError(
                    f"{folder}: was made with other settings: {'; '.join(changed)}; collect the gradients again, or go "
                    "back to those settings"
                )
        return cls(folder, spec)

    def path(self, checkpoint: int, shard: int) -> Path:
        """Where shard `shard` of checkpoint `checkpoint` (both from 0) lies."""
        return self.folder / f"checkpoint-{checkpoint + 1}" / f"shard-{shard:05d}.safetensors"

    def state(self, checkpoint: int, shard: int) -> ShardState:
        """Whether that shard is missing, whole (there, and unchanged since it was written) or broken."""
        if not self.path(checkpoint, shard).exists():
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
        self._check(checkpoint, shard, content, np.dtype(np.float32))
        path = self.path(checkpoint, shard)
        _refuse(path, content, ~np.isfinite(content.features).all(axis=1), "not finite", "drop them with their reason")
        _refuse(path, content, ~content.features.any(axis=1), "all zeros", "drop them with their reason")
        block = encode(content.features, self.spec.dtype)
        outside = f"outside the range of {self.spec.dtype}"
        _refuse(path, content, misfits(block), outside, "use gradients.store_dtype: float32 or float16")
        encoded = replace(content, features=block.values, scale=block.scale)
        write_shard(path, encoded, self._fingerprint, self._parts)

    def read(self, checkpoint: int, shard: int, *, verify: bool = False) -> Shard:
        """Memory-map one shard; its features and scale are as stored.

        Raises:
            StoreError: it is missing, broken or foreign.
        """
        path = self.path(checkpoint, shard)
        content = read_shard(path, self._fingerprint, self._parts, verify=verify)
        self._check(checkpoint, shard, content, DTYPES[self.spec.dtype])
        if (content.scale is None) == (self.spec.dtype in SCALED):
            raise ShardError(path, f"its {self.spec.dtype} features and their scale do not belong together")
        return content

    def exclude(self, rows: Mapping[int, str]) -> None:
        """Drop rows (index to reason) at every checkpoint, so that all hold the same ones.

        Shards that still hold one of them are rewritten, each atomically, without touching what else they hold: an
        interrupted call is finished by the next, and a repeated one changes nothing.

        Raises:
            StoreError: a row is not one of the store's, or a shard is missing or broken.
            RunError: the disk is full.
        """
        if outside := sorted(set(rows) - set(range(len(self.spec.ids)))):
            raise StoreError(f"{self.folder}: has no rows {outside[:5]}; it has 0-{len(self.spec.ids) - 1}")
        for t, s in self._places():
            if not rows.keys().isdisjoint(self.read(t, s).row.tolist()):
                content = self.read(t, s, verify=True).without(rows)
                write_shard(self.path(t, s), content, self._fingerprint, self._parts)

    def dropped(self) -> dict[int, str]:
        """Rows that any checkpoint lacks, in order, with the reason of the first checkpoint that does.

        Shards that are not there yet are passed over, so that this may be asked of an unfinished store.

        Raises:
            StoreError: a shard is broken.
        """
        found: dict[int, str] = {}
        for t, s in self._places():
            if self.path(t, s).exists():
                found = {**self.read(t, s).dropped, **found}
        return dict(sorted(found.items()))

    def kept(self) -> NDArray[np.int64]:
        """Indices of the rows that are present at every checkpoint: int64 [n], ascending.

        Raises:
            StoreError: a shard is missing or broken, checkpoints hold different rows, or none is left.
        """
        return np.concatenate([shard.row for shard in self._shards()[0]])

    def features(self, *, verify: bool = True) -> list[list[Block]]:
        """Memory-mapped features of the kept rows: for each checkpoint blocks [n_s, d] with their scale, in row order.

        Args:
            verify: read all bytes and check their sha256.

        Raises:
            StoreError: as :meth:`kept`; the shard is named.
        """
        return [[shard.block for shard in shards if len(shard.row)] for shards in self._shards(verify=verify)]

    def column(self, name: str) -> NDArray[Any]:
        """`norm`, `loss` or `tokens` of the kept rows: [T, n]. Raises as :meth:`kept`."""
        return np.stack([np.concatenate([getattr(s, name) for s in shards]) for shards in self._shards()])

    def verify(self) -> list[Problem]:
        """Everything that is wrong with the store, without stopping at the first; empty if it is complete and intact.

        Reads all bytes and checks their sha256.
        """
        found: list[Problem] = []
        for s, rows in enumerate(self._ranges):
            whole: list[tuple[int, Shard]] = []
            for t in range(self.spec.checkpoints):
                try:
                    whole.append((t, self.read(t, s, verify=True)))
                except ShardError as error:
                    missing = f"{error.reason}: rows {rows.start}-{rows.stop - 1} of checkpoint {t + 1} are missing"
                    found.append(Problem(self.path(t, s), missing))
            found += [Problem(self.path(t, s), reason) for t, reason in self._disagreements(whole)]
        return found

    def _places(self) -> Iterator[tuple[int, int]]:
        return ((t, s) for t in range(self.spec.checkpoints) for s in range(len(self._ranges)))

    def _shards(self, *, verify: bool = False) -> list[list[Shard]]:
        """Every shard [T][S], all checkpoints holding the same rows."""
        shards = [
            [self.read(t, s, verify=verify) for s in range(len(self._ranges))] for t in range(self.spec.checkpoints)
        ]
        for s in range(len(self._ranges)):
            for t, reason in self._disagreements([(t, shards[t][s]) for t in range(self.spec.checkpoints)]):
                raise ShardError(self.path(t, s), reason)
        if not any(len(shard.row) for shard in shards[0]):
            reasons = sorted({reason for shard in shards[0] for reason in shard.dropped.values()})
            raise StoreError(f"{self.folder}: every row was dropped ({'; '.join(reasons[:3])})")
        return shards

    def _disagreements(self, shards: list[tuple[int, Shard]]) -> Iterator[tuple[int, str]]:
        """(checkpoint, reason) of each of the same shard's checkpoints that lacks a row another one holds."""
        held = {row for _, shard in shards for row in shard.row.tolist()}
        for t, shard in shards:
            for row in sorted(held & shard.dropped.keys())[:1]:
                yield (
                    t,
                    (
                        f"it lacks row {row} ({self.spec.ids[row]!r}, dropped: {shard.dropped[row]}), which other "
                        "checkpoints hold"
                    ),
                )

    def _check(self, checkpoint: int, shard: int, content: Shard, dtype: np.dtype[Any]) -> None:
        """The rows and the dropped ones must be that shard's, in the shapes of the spec and in `dtype`."""
        rows, path = self._ranges[shard], self.path(checkpoint, shard)
        present, n = content.row.tolist(), len(content.row)
        if any(getattr(content, name).shape != (n,) for name in COLUMNS) or sorted(present) != present:
            raise ShardError(path, "its columns are not n rows in ascending order")
        if sorted([*present, *content.dropped]) != list(rows):
            raise ShardError(path, f"it holds other rows than {rows.start}-{rows.stop - 1}")
        if content.features.shape != (n, self.spec.dim) or content.features.dtype != dtype:
            raise ShardError(
                path,
                f"its features are {content.features.dtype} {content.features.shape}, expected {dtype} "
                f"{(n, self.spec.dim)}",
            )
        if content.scale is not None and content.scale.shape != (n,):
            raise ShardError(path, f"its scale has shape {content.scale.shape}, expected {(n,)}")


def _read_spec(manifest: Path) -> StoreSpec:
    """The spec that a manifest holds, if it matches its fingerprint.

    Raises:
        RunError: it cannot be read, or is not JSON.
        StoreError: it is of another version, lacks a key, or was changed.
    """
    value = read_json(manifest)
    version = value.get("version") if isinstance(value, dict) else None
    if version != VERSION:
        raise StoreError(f"{manifest}: version {version!r}, this program reads {VERSION}")
    names = ("checkpoints", "dim", "dtype", "shard_rows", "origin")
    try:
        spec = StoreSpec(ids=tuple(value["ids"]), **{name: value[name] for name in names})
        intact = {**spec.to_json(), "fingerprint": spec.fingerprint} == {**value, "fingerprint": value["fingerprint"]}
    except KeyError as error:
        raise StoreError(f"{manifest}: {error} is missing; collect the gradients again") from None
    except (TypeError, AttributeError, StoreError):
        intact = False
    if not intact:
        raise StoreError(f"{manifest}: was changed by hand; collect the gradients again")
    return spec


def _plain(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts as JSON gives them back, so that a tuple equals the list it was stored as."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(parts)))
    return plain


def _refuse(path: Path, content: Shard, bad: Any, what: str, mend: str) -> None:
    if bad.any():
        first = content.row[bad][:5].tolist()
        raise StoreError(f"{path}: {int(bad.sum())} rows are {what} (first: {first}); {mend}")
