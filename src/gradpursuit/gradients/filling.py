"""Filling stores with features of a table: finished shards are kept, rows without a feature dropped with a reason."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from gradpursuit.data import Row, Table
from gradpursuit.errors import GradientError
from gradpursuit.files import exists
from gradpursuit.gradients.engine import Computed, RowEngine
from gradpursuit.progress import Progress
from gradpursuit.store import GradientStore, Shard, StoreSpec
from gradpursuit.trajectory.model import Compute


@dataclass(frozen=True)
class CollectSpec:
    """What the features of a run have in common.

    Attributes:
        dim, nonzeros, sketch_seed: of the sketch.
        tokens_per_batch: padded tokens in one backward pass.
        dtype: of the stored features.
        shard_rows: rows per shard.
        max_dropped: share of a table's rows that may be without a feature before it is an error.
        origin: hashes of model, adapter and trajectory, as JSON values, for the identity of the stores.
    """

    dim: int
    nonzeros: int
    sketch_seed: int
    tokens_per_batch: int
    dtype: str
    shard_rows: int
    max_dropped: float
    origin: Mapping[str, Any]


class Kind(Protocol):
    """What a store holds of every row."""

    @property
    def label(self) -> str:
        """A name for folders."""

    def describe(self) -> dict[str, Any]:
        """What makes it what it is, as JSON values."""


KindT = TypeVar("KindT", bound=Kind)
Todo = Mapping[tuple[int, int], Sequence[KindT]]  # (checkpoint, shard) -> the kinds whose stores lack it


class Fill(Protocol):
    """What computes and writes shards."""

    def __call__(
        self, table: Table, stores: Mapping[Any, GradientStore], todo: Todo[Any], advance: Callable[[int], None]
    ) -> Iterator[Mapping[int, str]]:
        """Write the shards `todo`, telling `advance` of rows as they are done; of each shard the dropped rows."""


class StoreFiller(ABC, Generic[KindT]):
    """Fills stores, one for each kind of feature; finished shards are never computed again.

    Args:
        compute: device and precision.
        spec: sizes, seeds and origin.

    Attributes:
        fill: who computes and writes shards; this process, unless it is set to something else.
        precision: of the model's passes, float32 or bfloat16.
    """

    def __init__(self, compute: Compute, spec: CollectSpec) -> None:
        self.fill: Fill = self._fill_here
        self._where, self.spec = compute, spec
        self.precision = str(compute.autocast or torch.float32).removeprefix("torch.")

    @abstractmethod
    def at(self, checkpoint: int, wanted: Sequence[KindT]) -> RowEngine:
        """The engine at a checkpoint of the stores (from 0), set to compute `wanted`."""

    @abstractmethod
    def store_spec(self, table: Table, kind: KindT) -> StoreSpec:
        """What the store of a table's features of one kind is."""

    @abstractmethod
    def progress_name(self, split: str, wanted: Sequence[KindT]) -> str:
        """What the work on a split is called."""

    def collect(self, name: str, table: Table, wanted: Sequence[KindT], folder: Path) -> dict[str, GradientStore]:
        """Features of every row of `table` at every checkpoint, one store for each of `wanted`.

        A row that has no feature at some checkpoint is dropped from all stores, with its reason.

        Args:
            name: of the split, for progress.
            table: the rows.
            wanted: kinds of features, with stores of as many checkpoints.
            folder: gets one store per kind, named by its label.

        Raises:
            GradientError: more than `max_dropped` of the rows have no feature; ids and reasons are named.
            RunError: the disk is full.
        """
        stores = {kind: GradientStore.create(folder / kind.label, self.store_spec(table, kind)) for kind in wanted}
        spec = next(iter(stores.values())).spec
        shards, checkpoints = spec.shards(), range(spec.checkpoints)
        todo = {
            (t, s): lacking
            for t in checkpoints
            for s in range(len(shards))
            if (lacking := [kind for kind, store in stores.items() if not store.has(t, s)])
        }
        finished = [
            store.shards.columns(t, s).dropped
            for t in checkpoints
            for s in range(len(shards))
            for kind, store in stores.items()
            if kind not in todo.get((t, s), ())
        ]
        dropped = {row: why for part in finished for row, why in part.items()}
        self._refuse_too_many(table, stores, dropped)
        if todo:
            self._compute(name, table, stores, todo, dropped)
        self._settle(table, stores)
        return {kind.label: store for kind, store in stores.items()}

    def _compute(
        self,
        name: str,
        table: Table,
        stores: Mapping[KindT, GradientStore],
        todo: Todo[KindT],
        dropped: dict[int, str],
    ) -> None:
        """Fill the shards `todo`; add to `dropped`."""
        spec = next(iter(stores.values())).spec
        shards, total = spec.shards(), len(table) * spec.checkpoints
        done = total - sum(len(shards[s]) for _, s in todo)
        with Progress(self.progress_name(name, list(stores)), total, "rows", done) as progress:
            for found in self.fill(table, stores, todo, progress.update):
                if found:
                    dropped.update(found)
                    self._refuse_too_many(table, stores, dropped)

    def _fill_here(
        self, table: Table, stores: Mapping[KindT, GradientStore], todo: Todo[KindT], advance: Callable[[int], None]
    ) -> Iterator[Mapping[int, str]]:
        shards = next(iter(stores.values())).spec.shards()
        for (t, s), lacking in todo.items():
            made = self.shards(t, lacking, [table[i] for i in shards[s]], shards[s], advance)
            for kind, shard in zip(lacking, made, strict=True):
                stores[kind].write(t, s, shard)
            yield made[0].dropped

    def shards(
        self,
        checkpoint: int,
        wanted: Sequence[KindT],
        rows: Sequence[Row],
        numbers: range,
        advance: Callable[[int], None],
    ) -> list[Shard]:
        """The shards of `rows` at a checkpoint (from 0), one for each of `wanted`.

        numbers: of the rows in the table. advance: told how many more rows are done.
        """
        return _as_shards(self.at(checkpoint, wanted).compute(rows, advance), numbers)

    def _settle(self, table: Table, stores: Mapping[KindT, GradientStore]) -> None:
        """All checkpoints of all stores must hold the same rows."""
        dropped = {row: reason for store in stores.values() for row, reason in store.dropped().items()}
        self._refuse_too_many(table, stores, dropped)
        for store in stores.values():
            store.exclude(dropped)

    def _refuse_too_many(self, table: Table, stores: Mapping[KindT, GradientStore], dropped: Mapping[int, str]) -> None:
        """The rows dropped so far, index to reason, must be few enough."""
        if len(dropped) <= self.spec.max_dropped * len(table):
            return
        named = [(table[i], dropped[i]) for i in sorted(dropped)]
        some = ", ".join(f"'{row.id}' ({reason})" for row, reason in named[:5])
        advice = (
            "every row so far is affected, so look at the model's weights and at warmup.learning_rate"
            if len(dropped) == _rows_seen(next(iter(stores.values())))
            else "remove these rows, or raise gradients.max_dropped"
            + (", or try model.precision: float32" if self.precision != "float32" else "")
        )
        raise GradientError(
            f"{len(dropped)} of {len(table)} rows have no gradient, more than gradients.max_dropped = "
            f"{self.spec.max_dropped:g} allows: {some}; first at {named[0][0].where}; {advice}"
        )


def _rows_seen(store: GradientStore) -> int:
    """Rows of the shards that are there at any checkpoint."""
    checkpoints = range(store.spec.checkpoints)
    return sum(
        len(rows) for s, rows in enumerate(store.spec.shards()) if any(exists(store.path(t, s)) for t in checkpoints)
    )


def identity(table: Table, kind: Kind) -> dict[str, Any]:
    """What a store holds features of: sha256 of the rows' content and of what is supervised, and the kind."""
    data, masks = hashlib.sha256(), hashlib.sha256()
    for row in table:
        data.update(f"{row.hash}:{row.input_ids}\n".encode())
        masks.update(f"{row.labels}\n".encode())
    return {"data": data.hexdigest(), "masks": masks.hexdigest(), **kind.describe()}


def _as_shards(found: Computed, rows: range) -> list[Shard]:
    """One shard for each kind of feature of the rows of the table at `rows`."""
    index = np.array([rows[i] for i in found.kept], dtype=np.int64)
    dropped = {rows[i]: reason for i, reason in found.dropped.items()}
    loss, tokens = found.loss.numpy(), found.tokens.numpy()
    return [Shard(kind.features.numpy(), kind.norm.numpy(), loss, tokens, index, dropped) for kind in found.kinds]
