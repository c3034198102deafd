"""The data stage: read, identify, render, drop with reasons, split, write; row by row, however large the pool."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from gradpursuit.config import DataSection
from gradpursuit.data.duplicates import ExactCopies, NearCopies, text_hash, words
from gradpursuit.data.formats import count
from gradpursuit.data.leakage import Leaks, Protected
from gradpursuit.data.readers import Example, read_examples
from gradpursuit.data.render import Rendered, Renderer
from gradpursuit.data.schemas import Conversation, recognise
from gradpursuit.data.table import Row, Table, TableWriter
from gradpursuit.errors import DataError
from gradpursuit.files import write_atomic, write_folder
from gradpursuit.progress import Progress
from gradpursuit.sources import expand

logger = logging.getLogger("gradpursuit")
_BATCH = 256  # rows that are tokenized together
_TARGET = ("target", "heldout")


@dataclass(frozen=True)
class Clean:
    """A row that can be trained on, and what it says."""

    row: Row
    conversation: Conversation

    @property
    def protected(self) -> Protected:
        """What must not be in others."""
        return Protected(self.row.id, self.row.hash, self.conversation)


class _Place(Protocol):
    """What a dropped row is known by."""

    @property
    def id(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def line(self) -> int: ...


def drop_record(split: str, place: _Place, reason: str, **more: Any) -> dict[str, Any]:
    """One line of `dropped.jsonl`."""
    record = {"split": split, "id": place.id, "source": place.source, "line": place.line, "reason": reason}
    return {**record, "file": place.file, **more}


class Dropped:
    """`dropped.jsonl`: one line for every row that was left out, written as it is found."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.reasons: Counter[str] = Counter()  # "split: reason"

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Dropped]:
        """The file appears under its name when the block ends without an error; what was dropped is logged."""
        with write_atomic(path) as file:
            made = cls(file)
            yield made
        for reason, number in made.reasons.items():
            logger.warning("dropped %d rows of %s", number, reason)

    def add(self, split: str, place: _Place, reason: str, **more: Any) -> None:
        """Write one line; `more` goes into it as well."""
        record = drop_record(split, place, reason, **more)
        self._file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        self.reasons[f"{split}: {reason}"] += 1


@dataclass
class Cleaner:
    """Reads and renders splits, and drops, with reason and id, what cannot be trained on.

    Attributes:
        config: the sources, and what is dropped.
        renderer: of the model.
        dropped: takes the rows that are left out.
        schemas: rows of every schema that was recognised, by split and source.
    """

    config: DataSection
    renderer: Renderer
    dropped: Dropped
    schemas: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)

    def clean(self, name: str) -> Iterator[Clean]:
        """The usable rows of split `name`, in order.

        Reasons to drop one: `no supervised token`, `longer than max_tokens`, and what the chat template refuses.

        Raises:
            DataError: a source cannot be read, or more than `data.max_dropped` of the rows, or all, were dropped.
        """
        inputs = expand(getattr(self.config, name))
        counts = [count(made) for made in inputs]
        total = None if None in counts else sum(number or 0 for number in counts)
        losses = _Losses(name, self.config.max_dropped)
        schemas = self.schemas.setdefault(name, {})
        examples = read_examples(inputs, self.config.columns)
        with Progress(f"render {name}", total) as progress:
            while batch := list(islice(examples, _BATCH)):
                rendered = self.renderer.many([example.conversation for example in batch])
                for example, found in zip(batch, rendered, strict=True):
                    schemas.setdefault(example.source, Counter())[example.schema] += 1
                    reason = self._unusable(found)
                    losses.count(example, reason)
                    if reason:
                        self.dropped.add(name, example, reason)
                    else:
                        assert isinstance(found, Rendered)
                        yield Clean(_row(example, found), example.conversation)
                progress.update(len(batch))
        for source, found_schemas in schemas.items():
            logger.info("%s: %s: %s", name, source, _schema_text(found_schemas))
        losses.refuse()

    def _unusable(self, found: Rendered | DataError) -> str:
        if isinstance(found, DataError):
            return str(found)
        if len(found.input_ids) > self.config.max_tokens:
            return "longer than max_tokens"
        return "" if found.supervised else "no supervised token"


def prepare(config: DataSection, renderer: Renderer, folder: Path, holdout: float, seed: int) -> dict[str, Any]:
    """Write `pool.parquet`, `target.parquet`, `heldout.parquet` and `dropped.jsonl` into `folder`, or nothing.

    Pool rows that hold the text of a target or held-out row are dropped as leaks, and copies of earlier pool rows as
    duplicates (target rows are kept as they are given: whoever repeats one means it). Without a held-out source, the
    share `holdout` of the target is set aside, drawn with `seed`.

    Returns:
        Counts for the manifest: rows kept per split, drops per reason, distinct texts of the pool, schemas per source,
        and how the supervised tokens were found.

    Raises:
        DataError: a source is unusable, or too little is left of a split.
    """
    _require_sources(config, "pool", "target")
    with write_folder(folder) as part, Dropped.opened(part / "dropped.jsonl") as dropped:
        cleaner = Cleaner(config, renderer, dropped)
        target = _targets(cleaner, part, holdout, seed)
        copies = ExactCopies()
        guard = _Guard(config, [row.protected for split in target.values() for row in split])
        rows = 0
        with TableWriter.opened(part / "pool.parquet") as writer:
            for clean in cleaner.clean("pool"):
                if not guard.refuses(clean, copies, dropped):
                    writer.add(clean.row)
                    rows += 1
            if not rows:
                raise DataError("every row of the pool is also in target or heldout: nothing is left")
        counts = {"pool": rows, **{name: len(split) for name, split in target.items()}}
        if guard.kept:
            logger.warning("%d pool rows hold the text of a target or held-out row and are kept", guard.kept)
    return {
        "rows": counts,
        "dropped": dict(dropped.reasons),
        "distinct": len(copies),
        "leaks_kept": guard.kept,
        "schemas": {name: {s: dict(found) for s, found in split.items()} for name, split in cleaner.schemas.items()},
        "masks": renderer.masks,
    }


def prepare_target(
    config: DataSection, pool: Table, renderer: Renderer, folder: Path, holdout: float, seed: int
) -> dict[str, Any]:
    """Clean another target for a `pool` that is not to change: write what :func:`prepare` writes, but no pool.

    Pool rows that leak it are listed in `dropped.jsonl`; whoever chooses from the pool for this target has to leave
    them out (:func:`left_out`).

    Returns:
        Counts for the manifest: rows kept per split, drops per reason, and pool rows to leave out.

    Raises:
        DataError: a source is unusable, or too little is left of the target or of the pool.
    """
    _require_sources(config, "target")
    with Dropped.opened(folder / "dropped.jsonl") as dropped:
        cleaner = Cleaner(config, renderer, dropped)
        target = _targets(cleaner, folder, holdout, seed)
        leaks = Leaks([row.protected for split in target.values() for row in split])
        said, found = _Said(config), 0
        with Progress("look for the target in the pool", len(pool)) as progress:
            for row in pool if config.leaks == "remove" else ():
                if leak := leaks.find(row.hash, said(row)):
                    found += 1
                    reason = f"{leak[1]} target or heldout; left out of selections for this target"
                    dropped.add("pool", row, reason, leaks=leak[0])
                progress.update()
        if found == len(pool):
            raise DataError("every row of the pool is also in target or heldout: nothing is left to choose from")
    return {
        "rows": {name: len(split) for name, split in target.items()},
        "dropped": dict(dropped.reasons),
        "leaks": found,
    }


def left_out(folder: Path) -> set[str]:
    """Ids of the pool rows that a target, cleaned into `folder` by :func:`prepare_target`, rules out."""
    with (folder / "dropped.jsonl").open(encoding="utf-8") as file:
        return {record["id"] for record in map(json.loads, file) if record["split"] == "pool"}


def split_off(target: Sequence[Clean], holdout: float, seed: int) -> tuple[list[Clean], list[Clean]]:
    """Split the target into what guides the selection and what scores it; copies stay on one side.

    Raises:
        DataError: the target has too few distinct rows to leave one on either side.
    """
    hashes = sorted({clean.row.hash for clean in target})
    if len(hashes) < 2:
        raise DataError(
            f"the target holds {len(hashes)} distinct rows; at least 2 are needed to hold some out: "
            "add rows, or give held-out rows of their own (data.heldout)"
        )
    number = min(max(1, round(holdout * len(hashes))), len(hashes) - 1)
    chosen = {hashes[i] for i in np.random.default_rng(seed).permutation(len(hashes))[:number]}
    heldout = [clean for clean in target if clean.row.hash in chosen]
    logger.info("no held-out file: %d of %d target rows are set aside for scoring", len(heldout), len(target))
    return [clean for clean in target if clean.row.hash not in chosen], heldout


class _Guard:
    """Keeps leaks and copies out of the pool."""

    def __init__(self, config: DataSection, protected: Sequence[Protected]) -> None:
        self._config, self._leaks, self.kept = config, Leaks(protected), 0
        self._near = NearCopies(config.near_threshold) if config.deduplicate == "near" else None
        self._targets = {f"target {number}": row.id for number, row in enumerate(protected)}
        for key, row in zip(self._targets, protected, strict=True):
            if self._near and config.leaks == "remove":
                self._near.first(words(row.conversation), key)

    def refuses(self, clean: Clean, copies: ExactCopies, dropped: Dropped) -> bool:
        """Whether a pool row is left out; then it is listed."""
        row = clean.row
        if leak := self._leaks.find(row.hash, clean.conversation):
            if self._config.leaks == "remove":
                dropped.add("pool", row, f"{leak[1]} target or heldout", leaks=leak[0])
                return True
            self.kept += 1
        first = copies.first(row.hash, row.id)
        if first is not None and self._config.deduplicate != "none":
            dropped.add("pool", row, "duplicate", duplicate_of=first)
            return True
        return self._near is not None and self._is_near(self._near, clean, dropped)

    def _is_near(self, near: NearCopies, clean: Clean, dropped: Dropped) -> bool:
        key = near.first(words(clean.conversation), f"pool {clean.row.id}")
        if key is None:
            return False
        if key in self._targets:
            dropped.add("pool", clean.row, "near duplicate of a row of target or heldout", leaks=self._targets[key])
        else:
            dropped.add("pool", clean.row, "near duplicate", duplicate_of=key.removeprefix("pool "))
        return True


class _Losses:
    """Counts how many rows of a split are unusable, and why."""

    def __init__(self, name: str, allowed: float) -> None:
        self._name, self._allowed, self._total = name, allowed, 0
        self._reasons: Counter[str] = Counter()
        self._first: Example | None = None

    def count(self, example: Example, reason: str) -> None:
        """One more row, unusable for `reason` if that is not empty."""
        self._total += 1
        if reason:
            self._reasons[reason] += 1
            self._first = self._first or example

    def refuse(self) -> None:
        """Raise if too few rows are left."""
        lost = self._reasons.total()
        if self._first and (lost == self._total or lost > self._allowed * self._total):
            reasons = ", ".join(f"{number} × {reason}" for reason, number in self._reasons.most_common())
            raise DataError(
                f"{lost} of {self._total} rows of the {self._name} cannot be used ({reasons}; first: "
                f"{self._first.file}:{self._first.line}); raise data.max_tokens, mend the rows, or raise "
                "data.max_dropped"
            )


def _require_sources(config: DataSection, *names: str) -> None:
    for name in names:
        if not getattr(config, name):
            raise DataError(f"data.{name} names no file")


def _targets(cleaner: Cleaner, folder: Path, holdout: float, seed: int) -> dict[str, list[Clean]]:
    """Target and held-out rows, cleaned and written; the held-out ones are not in the target."""
    target = list(cleaner.clean("target"))
    if cleaner.config.heldout:
        heldout = list(cleaner.clean("heldout"))
    else:
        target, heldout = split_off(target, holdout, seed)
    leaks = Leaks([row.protected for row in heldout], [row.protected for row in target])
    kept = []
    for clean in target:
        if leak := leaks.find(clean.row.hash, clean.conversation):
            cleaner.dropped.add("target", clean.row, f"{leak[1]} heldout", leaks=leak[0])
        else:
            kept.append(clean)
    if not kept:
        raise DataError("every row of the target is also in heldout: nothing is left")
    made = {"target": kept, "heldout": heldout}
    for name, rows in made.items():
        Table([clean.row for clean in rows]).write(folder / f"{name}.parquet")
    return made


def _row(example: Example, rendered: Rendered) -> Row:
    return Row(
        example.id,
        text_hash(rendered.text),
        example.source,
        example.line,
        example.original,
        rendered.input_ids,
        rendered.labels,
        example.file,
    )


class _Said:
    """What the rows of a pool that was cleaned before say."""

    def __init__(self, config: DataSection) -> None:
        self._default = config.columns
        mapped = [source for source in config.pool if source.columns is not None]
        self._own = {made.path: made.source.columns for made in expand(mapped)}

    def __call__(self, row: Row) -> Conversation:
        """The conversation of a row."""
        mapping = self._own.get(row.file) or self._default
        return recognise(row.columns, mapping, f"{row.file}:{row.line}")[1]


def _schema_text(schemas: Mapping[str, int]) -> str:
    return ", ".join(f"{number} rows of {schema}" for schema, number in schemas.items())
