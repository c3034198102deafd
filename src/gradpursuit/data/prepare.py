"""The data stage: read, identify, render, drop with reasons, split, write; row by row, however large the pool."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gradpursuit.config import DataSection
from gradpursuit.data.dropped import TOO_LONG, Dropped, Losses
from gradpursuit.data.duplicates import Copies, NearCopies, exact_hash, said, text_hash
from gradpursuit.data.formats import count
from gradpursuit.data.leakage import Leak, Leaks, Protected
from gradpursuit.data.readers import Example, Unreadable, read_examples
from gradpursuit.data.render import Rendered, Renderer
from gradpursuit.data.said import Said
from gradpursuit.data.schemas import Conversation
from gradpursuit.data.table import Row, Table, TableWriter
from gradpursuit.errors import DataError
from gradpursuit.files import write_folder
from gradpursuit.progress import Progress
from gradpursuit.sources import expand

logger = logging.getLogger("gradpursuit")
EXACT, FOLDED = "duplicate", "duplicate up to case and white space"  # why a copy was dropped
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


@dataclass
class Cleaner:
    """Reads and renders splits, and drops, with reason and id, what cannot be trained on.

    Attributes:
        config: the sources, and what is dropped.
        renderer: of the model.
        dropped: takes the rows that are left out.
        schemas: rows of every schema that was recognised, by split and source.
        notes: rows of every note on what is not read, by split.
    """

    config: DataSection
    renderer: Renderer
    dropped: Dropped
    schemas: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    notes: dict[str, Counter[str]] = field(default_factory=dict)

    def clean(self, name: str) -> Iterator[Clean]:
        """The usable rows of split `name`, in order.

        Reasons to drop one: it cannot be read (`detail` says what is wrong with it), `no supervised token`, `longer
        than max_tokens`, more tokens than the model has positions, and what the chat template refuses.

        Raises:
            DataError: a source cannot be read, or more than `data.max_dropped` of the rows, or all, were dropped.
        """
        inputs = expand(getattr(self.config, name) or [])
        counts = [count(made) for made in inputs]
        total = None if None in counts else sum(number or 0 for number in counts)
        losses = Losses(name, self.config.max_dropped)
        schemas, notes = self.schemas.setdefault(name, {}), self.notes.setdefault(name, Counter())
        examples = read_examples(inputs, self.config.columns)
        with Progress(f"render {name}", total) as progress:
            while batch := list(islice(examples, _BATCH)):
                said = [row.conversation for row in batch if isinstance(row, Example)]
                rendered = iter(self.renderer.many(said, self.config.max_tokens))
                for example in batch:
                    if isinstance(example, Unreadable):
                        losses.count(example, example.reason)
                        self.dropped.add(name, example, example.reason, detail=example.detail)
                        continue
                    found = next(rendered)
                    schemas.setdefault(example.source, Counter())[example.schema] += 1
                    notes.update(example.conversation.notes)
                    self._refuse_unknown(example, found)
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
        for note, rows in notes.items():
            logger.warning("%s: %s (%d rows)", name, note, rows)
        losses.refuse()

    def _refuse_unknown(self, example: Example, found: Rendered | DataError) -> None:
        """A token without an embedding: the tokenizer is not the model's, and no row of it can be trusted."""
        limits = self.renderer.limits
        token = limits.beyond(found.input_ids) if isinstance(found, Rendered) else None
        if token is not None:
            raise DataError(
                f"token '{self.renderer.name(token)}' ({token}) of row {example.file}:{example.line} is past the "
                f"model's {limits.vocabulary:,} embeddings: the tokenizer has tokens that the model has not; resize "
                "them (model.resize_token_embeddings(len(tokenizer))) and save the model, or give the tokenizer that "
                "belongs to it"
            )

    def _unusable(self, found: Rendered | DataError) -> str:
        if isinstance(found, DataError):
            return str(found)
        if len(found.input_ids) > self.config.max_tokens:
            return TOO_LONG
        if reason := self.renderer.limits.too_long(len(found.input_ids)):
            return reason
        return "" if found.supervised else "no supervised token"


def prepare(config: DataSection, renderer: Renderer, folder: Path, holdout: float, seed: int) -> dict[str, Any]:
    """Write `pool.parquet`, `target.parquet`, `heldout.parquet` and `dropped.jsonl` into `folder`, or nothing.

    Pool rows that hold the text of a target or held-out row, or a large part of it, are dropped as leaks, and copies of
    earlier pool rows as duplicates (target rows are kept as they are given: whoever repeats one means it). Without a
    held-out source, the share `holdout` of the target is set aside, drawn with `seed`. In-domain the pool is its own
    target: there are no target rows, and the share is that of the pool.

    Returns:
        Counts for the manifest: rows kept per split, drops per reason, texts of the pool that are distinct up to case
        and white space, schemas per source, notes on what is not read, and how the supervised tokens were found.

    Raises:
        DataError: a source is unusable, or too little is left of a split.
    """
    _require_sources(config, "pool", "target")
    with write_folder(folder) as part, Dropped.opened(part / "dropped.jsonl") as dropped:
        cleaner = Cleaner(config, renderer, dropped)
        target = _targets(cleaner, part, holdout, seed)
        counts = {name: len(split) for name, split in target.items()}
        guard = _Guard(config, [row.protected for split in target.values() for row in split])
        counts["pool"] = guard.filter(cleaner, part / "pool.parquet")
        if "heldout" not in counts:
            counts.update(_split_pool(part, holdout, seed))
    return {
        "rows": {name: counts[name] for name in ("pool", *_TARGET)},
        "dropped": dict(dropped.reasons),
        "distinct": len(set(Table.read(folder / "pool.parquet").column("hash"))),
        "leaks_kept": guard.kept,
        "schemas": {name: {s: dict(found) for s, found in split.items()} for name, split in cleaner.schemas.items()},
        "notes": {name: dict(notes) for name, notes in cleaner.notes.items()},
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
        protected = [row.protected for split in target.values() for row in split]
        leaks = Leaks(protected, coverage=config.leak_coverage)
        conversation = Said(config.pool, config.columns, pool)
        suspects: list[tuple[int, Leak]] = []
        with Progress("look for the target in the pool", len(pool)) as progress:
            for position, row in enumerate(pool) if config.leaks == "remove" else ():
                if leak := leaks.find(row.hash, conversation(row)):
                    suspects.append((position, leak))
                progress.update()
        found = 0
        for position, suspicion in suspects:
            if leak := leaks.still(suspicion):
                found += 1
                reason = f"{leak.reason} target or heldout; left out of selections for this target"
                dropped.add("pool", pool[position], reason, **_evidence(leak))
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


def held_out(name: str, hashes: Sequence[str], holdout: float, seed: int) -> set[str]:
    """The hashes of the rows of split `name` (target or pool) that score, where the others guide; copies stay together.

    Raises:
        DataError: there are too few distinct rows to leave one on either side.
    """
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        raise DataError(
            f"the {name} holds {len(distinct)} distinct rows; at least 2 are needed to hold some out: "
            "add rows, or give held-out rows of their own (data.heldout)"
        )
    number = min(max(1, round(holdout * len(distinct))), len(distinct) - 1)
    chosen = {distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))[:number]}
    rows = sum(digest in chosen for digest in hashes)
    logger.info("no held-out file: %d of %d %s rows are set aside for scoring", rows, len(hashes), name)
    return chosen


class _Guard:
    """Keeps leaks and copies out of the pool."""

    def __init__(self, config: DataSection, protected: Sequence[Protected]) -> None:
        self._config, self._leaks = config, Leaks(protected, coverage=config.leak_coverage)
        self._copies, self.kept = Copies(), 0
        self._suspects: dict[int, Leak] = {}  # by the position of the row in the table
        self._near = NearCopies(config.near_threshold) if config.deduplicate == "near" else None
        self._targets = {f"target {number}": row.id for number, row in enumerate(protected)}
        for key, row in zip(self._targets, protected, strict=True):
            if self._near and config.leaks == "remove":
                self._near.first(said(row.conversation), key)

    def filter(self, cleaner: Cleaner, path: Path) -> int:
        """Clean the pool and write the rows that stay to `path`; returns how many they are."""
        rows = 0
        with TableWriter.opened(path) as writer:
            for clean in cleaner.clean("pool"):
                if not self._refuses(clean, cleaner.dropped, rows):
                    writer.add(clean.row)
                    rows += 1
        rows -= self._remove_suspects(path, cleaner.dropped)
        if not rows:
            raise DataError("every row of the pool is also in target or heldout: nothing is left")
        if self.kept:
            logger.warning("%d pool rows hold the text of a target or held-out row and are kept", self.kept)
        return rows

    def _remove_suspects(self, path: Path, dropped: Dropped) -> int:
        """Take rows out of the table that hold a part of a protected one; returns how many they are."""
        leaks = {at: leak for at, suspicion in self._suspects.items() if (leak := self._leaks.still(suspicion))}
        if self._config.leaks == "keep":
            self.kept += len(leaks)
            return 0
        if leaks:
            with TableWriter.opened(path) as writer:  # replaces the table when it is whole
                for position, row in enumerate(Table.read(path)):
                    if leak := leaks.get(position):
                        dropped.add("pool", row, f"{leak.reason} target or heldout", **_evidence(leak))
                    else:
                        writer.add(row)
        return len(leaks)

    def _refuses(self, clean: Clean, dropped: Dropped, position: int) -> bool:
        """Whether a pool row, else at `position` of the table, is left out; then it is listed."""
        row = clean.row
        leak = self._leaks.find(row.hash, clean.conversation)
        if leak and not leak.runs:
            if self._config.leaks == "remove":
                dropped.add("pool", row, f"{leak.reason} target or heldout", **_evidence(leak))
                return True
            self.kept += 1
        if self._repeats(clean, dropped):
            return True
        if leak and leak.runs:
            self._suspects[position] = leak
        return False

    def _repeats(self, clean: Clean, dropped: Dropped) -> bool:
        """Whether a pool row is a copy of an earlier one; then it is listed."""
        row, exact = clean.row, self._config.deduplicate == "exact"
        digest = exact_hash(row.input_ids, row.labels) if exact else row.hash
        first = None if self._config.deduplicate == "none" else self._copies.first(digest, row.id)
        if first is not None:
            dropped.add("pool", row, EXACT if exact else FOLDED, duplicate_of=first)
            return True
        return self._near is not None and self._is_near(self._near, clean, dropped)

    def _is_near(self, near: NearCopies, clean: Clean, dropped: Dropped) -> bool:
        key = near.first(said(clean.conversation), f"pool {clean.row.id}")
        if key is None:
            return False
        if key in self._targets:
            dropped.add("pool", clean.row, "near duplicate of a row of target or heldout", leaks=self._targets[key])
        else:
            dropped.add("pool", clean.row, "near duplicate", duplicate_of=key.removeprefix("pool "))
        return True


def _require_sources(config: DataSection, *names: str) -> None:
    for name in names:
        if getattr(config, name) == []:
            raise DataError(f"data.{name} names no file")


def _targets(cleaner: Cleaner, folder: Path, holdout: float, seed: int) -> dict[str, list[Clean]]:
    """Target and held-out rows, cleaned and written; the held-out ones are not in the target.

    In-domain the target is empty, and without a held-out source of its own there are no held-out rows yet.
    """
    in_domain = cleaner.config.in_domain
    target = [] if in_domain else list(cleaner.clean("target"))
    made = {"target": target}
    if cleaner.config.heldout:
        made["heldout"] = list(cleaner.clean("heldout"))
    elif not in_domain:
        chosen = held_out("target", [clean.row.hash for clean in target], holdout, seed)
        made["heldout"] = [clean for clean in target if clean.row.hash in chosen]
        target = [clean for clean in target if clean.row.hash not in chosen]
    heldout, siblings = ([row.protected for row in rows] for rows in (made.get("heldout", []), target))
    leaks = Leaks(heldout, siblings, cleaner.config.leak_coverage)
    made["target"] = []
    for clean in target:
        if leak := leaks.find(clean.row.hash, clean.conversation):
            cleaner.dropped.add("target", clean.row, f"{leak.reason} heldout", **_evidence(leak))
        else:
            made["target"].append(clean)
    if target and not made["target"]:
        raise DataError("every row of the target is also in heldout: nothing is left")
    for name, rows in made.items():
        Table([clean.row for clean in rows]).write(folder / f"{name}.parquet")
    return made


def _split_pool(folder: Path, holdout: float, seed: int) -> dict[str, int]:
    """Move the share of the pool that scores into a table of its own; rows with the same text stay together."""
    pool = Table.read(folder / "pool.parquet")
    chosen = held_out("pool", pool.column("hash"), holdout, seed)
    counts = {"pool": 0, "heldout": 0}
    with ExitStack() as stack:
        writers = {name: stack.enter_context(TableWriter.opened(folder / f"{name}.parquet")) for name in counts}
        progress = stack.enter_context(Progress("set held-out rows aside", len(pool)))
        for row in pool:
            name = "heldout" if row.hash in chosen else "pool"
            writers[name].add(row)
            counts[name] += 1
            progress.update()
    return counts


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


def _evidence(leak: Leak) -> dict[str, Any]:
    """What is listed of a leak; the share only of a part."""
    part = {"coverage": round(leak.coverage, 3)} if leak.coverage < 1 else {}
    return {"leaks": leak.id, **part}


def _schema_text(schemas: Mapping[str, int]) -> str:
    return ", ".join(f"{number} rows of {schema}" for schema, number in schemas.items())
