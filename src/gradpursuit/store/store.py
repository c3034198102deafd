"""The gradient store: T checkpoints × N rows × d features in shards, complete only when every shard is there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradpursuit import aside, durable
from gradpursuit.errors import RunError, StoreError
from gradpursuit.files import exists, require_space, stored_bytes, write_json
from gradpursuit.remote import is_remote
from gradpursuit.store.encoding import Block
from gradpursuit.store.folder import ShardFolder, ShardState
from gradpursuit.store.shards import Columns, Shard, ShardError
from gradpursuit.store.spec import VERSION, StoreSpec, differences

logger = logging.getLogger("gradpursuit")
Content = TypeVar("Content", bound=Columns | Shard)


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
        self.shards = ShardFolder(
            folder,
            spec.fingerprint,
            {name: part for name, part in spec.parts().items() if name != "ids"},
            rows=len(spec.ids),
            shard_rows=spec.shard_rows,
            checkpoints=spec.checkpoints,
            dim=spec.dim,
            dtype=spec.dtype,
        )
        self._ranges = spec.shards()

    @classmethod
    def create(cls, folder: Path, spec: StoreSpec) -> GradientStore:
        """Start a store, or go on with the one that is there if it was begun with an equal spec.

        A whole store with another spec is set aside first, as its rows mean something else; the log says which part
        differs. Within a run it is deleted when this one is whole, and comes back if that fails; else it stays beside.
        A manifest that is lost or damaged is written again: shards know for themselves where they belong. Files of
        interrupted writes are removed.

        Raises:
            RunError: the disk cannot hold it.
        """
        store = cls(folder, spec)
        manifest = folder / "manifest.json"
        left = [] if is_remote(folder) else [*folder.glob("*.part"), *folder.glob("checkpoint-*/*.part")]
        for part in (part for part in left if durable.is_part(part) or part.stem.endswith((".json", ".safetensors"))):
            logger.warning("%s: left by an interrupted write; removed", part)
            part.unlink()
        if exists(manifest):
            try:
                present = read_spec(manifest)
            except (StoreError, RunError) as error:
                logger.warning("%s; it is written again, and the shards that fit it are kept", error)
            else:
                if present.fingerprint == store.shards.fingerprint:
                    return store
                changed = "; ".join(differences(present.parts(), _plain(spec.parts())))
                if is_remote(folder):
                    raise StoreError(
                        f"{folder}: holds gradients made with other settings: {changed}; nothing is deleted there. "
                        "Name another gradients.store, or go back to those settings"
                    )
                logger.warning("%s: holds gradients made with other settings: %s; they are replaced", folder, changed)
                if _replace(folder, cls(folder, present), store.shards.fingerprint):
                    return store
        if not is_remote(folder) and not any(folder.glob("checkpoint-*/*.safetensors")):
            require_space(folder, spec.nbytes, "the gradient store")
        write_json(manifest, {**spec.to_json(), "fingerprint": store.shards.fingerprint})
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
        if not exists(folder / "manifest.json"):
            raise StoreError(f"{folder}: no gradient store; collect the gradients first")
        spec = read_spec(folder / "manifest.json")
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
        return self.shards.path(checkpoint, shard)

    def paths(self) -> list[Path]:
        """Where all its shards lie."""
        return [self.path(t, s) for t, s in self._places()]

    def state(self, checkpoint: int, shard: int) -> ShardState:
        """As :meth:`ShardFolder.state`."""
        return self.shards.state(checkpoint, shard)

    def has(self, checkpoint: int, shard: int) -> bool:
        """As :meth:`ShardFolder.has`."""
        return self.shards.has(checkpoint, shard)

    def write(self, checkpoint: int, shard: int, content: Shard) -> None:
        """As :meth:`ShardFolder.write`."""
        self.shards.write(checkpoint, shard, content)

    def read(self, checkpoint: int, shard: int, *, verify: bool = False) -> Shard:
        """As :meth:`ShardFolder.read`."""
        return self.shards.read(checkpoint, shard, verify=verify)

    def has_all_files(self) -> bool:
        """Whether there is a file for every shard, whatever is in it."""
        return all(exists(self.path(t, s)) for t, s in self._places())

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
            if not rows.keys().isdisjoint(self.shards.columns(t, s).row.tolist()):
                self.shards.rewrite(t, s, self.read(t, s, verify=True).without(rows))

    def dropped(self) -> dict[int, str]:
        """Rows that any checkpoint lacks, in order, with the reason of the first checkpoint that does.

        Shards that are not there yet are passed over, so that this may be asked of an unfinished store.

        Raises:
            StoreError: a shard is broken.
        """
        found: dict[int, str] = {}
        for t, s in self._places():
            if exists(self.path(t, s)):
                found = {**self.shards.columns(t, s).dropped, **found}
        return dict(sorted(found.items()))

    def kept(self) -> NDArray[np.int64]:
        """Indices of the rows that are present at every checkpoint: int64 [n], ascending.

        Raises:
            StoreError: a shard is missing or broken, checkpoints hold different rows, or none is left.
        """
        return self.columns()[0]

    def features(self, *, verify: bool = True) -> list[list[Block]]:
        """Features of the kept rows, memory-mapped: for each checkpoint blocks [n_s, d] with their scale, in row order.

        Args:
            verify: read all bytes and check their sha256. What does not lie on a disk is then in memory; else it is
                fetched when it is used.

        Raises:
            StoreError: as :meth:`kept`; the shard is named.
        """
        found = [
            [self.read(t, s, verify=verify) for s in range(len(self._ranges))] for t in range(self.spec.checkpoints)
        ]
        return [[shard.block for shard in shards if len(shard.row)] for shards in self._agreeing(found)]

    def columns(self, *names: str) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
        """:meth:`kept`, and `norm`, `loss` or `tokens` of these rows [T, n] by name."""
        found = self._columns()
        named = {
            name: np.stack([np.concatenate([getattr(s, name) for s in shards]) for shards in found]) for name in names
        }
        return np.concatenate([shard.row for shard in found[0]]), named

    def column(self, name: str) -> NDArray[Any]:
        """`norm`, `loss` or `tokens` of the kept rows: [T, n]. Raises as :meth:`kept`."""
        return self.columns(name)[1][name]

    def verify(self) -> list[Problem]:
        """Everything that is wrong with the store, without stopping at the first; empty if it is complete and intact.

        Reads all bytes and checks their sha256.
        """
        found: list[Problem] = []
        for s, rows in enumerate(self._ranges):
            whole: list[tuple[int, Columns | Shard]] = []
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

    def _columns(self) -> Sequence[Sequence[Columns]]:
        """What every shard [T][S] says of its rows, all checkpoints holding the same ones."""
        return self._agreeing(
            [[self.shards.columns(t, s) for s in range(len(self._ranges))] for t in range(self.spec.checkpoints)]
        )

    def _agreeing(self, shards: list[list[Content]]) -> list[list[Content]]:
        """The same shards [T][S], if all checkpoints hold the same rows."""
        for s in range(len(self._ranges)):
            for t, reason in self._disagreements([(t, shards[t][s]) for t in range(self.spec.checkpoints)]):
                raise ShardError(self.path(t, s), reason)
        if not any(len(shard.row) for shard in shards[0]):
            reasons = sorted({reason for shard in shards[0] for reason in shard.dropped.values()})
            raise StoreError(f"{self.folder}: every row was dropped ({'; '.join(reasons[:3])})")
        return shards

    def _disagreements(self, shards: Sequence[tuple[int, Columns | Shard]]) -> Iterator[tuple[int, str]]:
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


def _replace(folder: Path, present: GradientStore, wanted: str) -> bool:
    """Set a whole store aside, delete another one; whether one begun with the `wanted` fingerprint is there now."""
    begun, old = aside.unfinished(folder), aside.before(folder)
    if not aside.set_aside(folder) and present.has_all_files():
        durable.discard(old)
        durable.put(folder, old)
        logger.warning("%s: kept there until you delete it", old)
    durable.discard(folder)
    try:
        same = read_spec(begun / "manifest.json").fingerprint == wanted
    except (StoreError, RunError):
        same = False
    if same:
        durable.put(begun, folder)
    return same


def read_spec(manifest: Path) -> StoreSpec:
    """The spec that a manifest holds, if it matches its fingerprint.

    Raises:
        RunError: it cannot be read, or is not JSON.
        StoreError: it is of another version, lacks a key, or was changed.
    """
    value, text = _parsed(manifest)
    version = value.get("version") if isinstance(value, dict) else None
    if version != VERSION:
        raise StoreError(
            f"{manifest}: damaged, or of another version of gradpursuit: version {str(version)[:20]}, this one reads "
            f"{VERSION}; collect the gradients again"
        )
    names = ("checkpoints", "dim", "dtype", "shard_rows", "origin")
    try:
        spec = StoreSpec(ids=tuple(value["ids"]), **{name: value[name] for name in names})
        intact = {**spec.to_json(), "fingerprint": spec.fingerprint} == {**value, "fingerprint": value["fingerprint"]}
        intact = intact and text == json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    except KeyError as error:
        raise StoreError(f"{manifest}: {error} is missing; collect the gradients again") from None
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError, StoreError):
        intact = False
    if not intact:
        raise StoreError(
            f"{manifest}: damaged: its contents do not match its fingerprint; collect the gradients again, whole "
            "shards are kept"
        )
    return spec


def _parsed(manifest: Path) -> tuple[Any, str]:
    """The JSON value and the text of a manifest, wherever it lies."""
    if not is_remote(manifest) and not manifest.is_file():
        raise StoreError(f"{manifest}: missing, or no plain file; collect the gradients again")
    try:
        text = bytes(stored_bytes(manifest)[:]).decode("utf-8")
        return json.loads(text), text
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{manifest}: damaged: it is not the JSON that was written ({error}); collect the gradients again, whole "
            "shards are kept"
        ) from None


def _plain(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts as JSON gives them back, so that a tuple equals the list it was stored as."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(parts)))
    return plain
