"""The data stage: read, identify, render, drop with reasons, split, write."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradpursuit.config import DataSection
from gradpursuit.data.readers import Example, read_examples
from gradpursuit.data.render import Renderer
from gradpursuit.data.table import Row, Table
from gradpursuit.errors import DataError
from gradpursuit.files import write_text
from gradpursuit.progress import Progress

logger = logging.getLogger("gradpursuit")


@dataclass
class Cleaned:
    """A split after cleaning: the kept `table`, and one record per dropped row in `dropped`."""

    table: Table
    dropped: list[dict[str, Any]] = field(default_factory=list)


def clean(name: str, examples: Sequence[Example], renderer: Renderer, config: DataSection) -> Cleaned:
    """Render `examples` and drop, with reason and id, what cannot be trained on.

    Reasons: `no supervised token`, `longer than max_tokens`, and what the chat template refuses.

    Raises:
        DataError: nothing is left, or more than `data.max_dropped` of the rows were dropped.
    """
    rows: list[Row] = []
    dropped: list[dict[str, Any]] = []
    with Progress(f"render {name}", len(examples)) as progress:
        for example in examples:
            reason, row = _render(example, renderer, config.max_tokens)
            if row is None:
                dropped.append(drop_record(name, example, reason))
            else:
                rows.append(row)
            progress.update()
    _refuse_large_loss(name, len(examples), dropped, config)
    return Cleaned(Table(rows), dropped)


def drop_record(split: str, example: Example | Row, reason: str) -> dict[str, Any]:
    """One line of `dropped.jsonl`."""
    return {
        "split": split,
        "id": example.id,
        "source": example.source,
        "line": example.line,
        "reason": reason,
    }


def prepare(config: DataSection, renderer: Renderer, folder: Path, holdout: float, seed: int) -> dict[str, Any]:
    """Write `pool.parquet`, `target.parquet`, `heldout.parquet` and `dropped.jsonl` into `folder`.

    Pool rows whose content is also in the target or the held-out file are dropped as leaks. Without a held-out
    file, the share `holdout` of the target is set aside, drawn with `seed`. In-domain the pool is its own target: there
    are no target rows, and the share is that of the pool.

    Returns:
        Counts for the manifest: rows read and kept per split, and drops per reason.

    Raises:
        DataError: a file is unusable, or too little is left of a split.
    """
    files = {"pool": config.pool, "target": config.target, "heldout": config.heldout}
    cleaned = _clean_all(files, renderer, config, holdout, seed)
    _drop_leaks(cleaned, "target", "heldout")
    _drop_leaks(cleaned, "pool", "target", "heldout")
    dropped = [record for part in cleaned.values() for record in part.dropped]
    return {**_write(cleaned, dropped, folder), "distinct": len({row.hash for row in cleaned["pool"].table})}


def prepare_target(
    config: DataSection, pool: Table, renderer: Renderer, folder: Path, holdout: float, seed: int
) -> dict[str, Any]:
    """Clean another target for a `pool` that is not to change: write what :func:`prepare` writes, but no pool.

    Pool rows whose content is also in the target or its held-out rows are listed in `dropped.jsonl`; whoever chooses
    from the pool for this target has to leave them out (:func:`leaks`).

    Returns:
        Counts for the manifest: rows kept per split, drops per reason, and pool rows to leave out.

    Raises:
        DataError: a file is unusable, or too little is left of the target or of the pool.
    """
    cleaned = _clean_all({"target": config.target, "heldout": config.heldout}, renderer, config, holdout, seed)
    _drop_leaks(cleaned, "target", "heldout")
    found = leaks(pool, cleaned["target"].table, cleaned["heldout"].table)
    if len(found) == len(pool):
        raise DataError("every row of the pool is also in target or heldout: nothing is left to choose from")
    reason = "same content as a row of target or heldout; left out of selections for this target"
    dropped = [record for part in cleaned.values() for record in part.dropped]
    dropped += [drop_record("pool", pool[i], reason) for i in found]
    return {**_write(cleaned, dropped, folder), "leaks": len(found)}


def leaks(table: Table, *others: Table) -> list[int]:
    """Positions of the rows of `table` whose content is also in one of the `others`."""
    hashes = {row.hash for other in others for row in other}
    return [index for index, row in enumerate(table) if row.hash in hashes]


def _clean_all(
    files: dict[str, list[str] | None], renderer: Renderer, config: DataSection, holdout: float, seed: int
) -> dict[str, Cleaned]:
    """Every split, cleaned; without a held-out file the share `holdout` of the target is split off."""
    cleaned = {name: clean(name, read_examples(paths), renderer, config) for name, paths in files.items() if paths}
    for name, paths in files.items():
        if paths == [] and name != "heldout":
            raise DataError(f"data.{name} names no file")
    own = "target" if "target" in cleaned else "pool"
    if "heldout" not in cleaned:
        cleaned[own], cleaned["heldout"] = split_off(own, cleaned[own], holdout, seed)
    cleaned.setdefault("target", Cleaned(Table([])))
    return cleaned


def _write(cleaned: dict[str, Cleaned], dropped: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    for name, part in cleaned.items():
        part.table.write(folder / f"{name}.parquet")
    write_text(folder / "dropped.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in dropped))
    reasons = Counter(f"{record['split']}: {record['reason']}" for record in dropped)
    for reason, count in reasons.items():
        logger.warning("dropped %d rows of %s", count, reason)
    return {"rows": {name: len(part.table) for name, part in cleaned.items()}, "dropped": dict(reasons)}


def split_off(name: str, target: Cleaned, holdout: float, seed: int) -> tuple[Cleaned, Cleaned]:
    """Split the target (or the pool: `name`) into what guides the selection and what scores it; copies stay together.

    Raises:
        DataError: it has too few distinct rows to leave one on either side.
    """
    hashes = sorted({row.hash for row in target.table})
    if len(hashes) < 2:
        raise DataError(
            f"the {name} holds {len(hashes)} distinct rows; at least 2 are needed to hold some out: "
            "add rows, or give held-out rows of their own (data.heldout)"
        )
    count = min(max(1, round(holdout * len(hashes))), len(hashes) - 1)
    chosen = {hashes[i] for i in np.random.default_rng(seed).permutation(len(hashes))[:count]}
    kept = Table([row for row in target.table if row.hash not in chosen])
    heldout = Table([row for row in target.table if row.hash in chosen])
    logger.info("no held-out file: %d of %d %s rows are set aside for scoring", len(heldout), len(target.table), name)
    return Cleaned(kept, target.dropped), Cleaned(heldout)


def _drop_leaks(cleaned: dict[str, Cleaned], name: str, *others: str) -> None:
    """Take out of split `name` what is also in the `others`, which it is to be scored or guided by."""
    part = cleaned[name]
    found = set(leaks(part.table, *(cleaned[other].table for other in others)))
    reason = f"same content as a row of {' or '.join(others)}"
    part.dropped += [drop_record(name, part.table[i], reason) for i in sorted(found)]
    if found and len(found) == len(part.table):
        raise DataError(f"every row of the {name} is also in {' or '.join(others)}: nothing is left")
    part.table = Table([row for i, row in enumerate(part.table) if i not in found])


def _render(example: Example, renderer: Renderer, max_tokens: int) -> tuple[str, Row | None]:
    try:
        rendered = renderer(example.messages)
    except DataError as error:
        return str(error), None
    if len(rendered.input_ids) > max_tokens:
        return "longer than max_tokens", None
    if rendered.supervised == 0:
        return "no supervised token", None
    original = json.dumps(example.columns, ensure_ascii=False)
    row = Row(
        example.id,
        example.hash,
        example.source,
        example.line,
        original,
        rendered.input_ids,
        rendered.labels,
    )
    return "", row


def _refuse_large_loss(name: str, total: int, dropped: list[dict[str, Any]], config: DataSection) -> None:
    if len(dropped) == total or len(dropped) > config.max_dropped * total:
        reasons = ", ".join(f"{n} × {reason}" for reason, n in Counter(r["reason"] for r in dropped).items())
        first = dropped[0]
        raise DataError(
            f"{len(dropped)} of {total} rows of the {name} cannot be used ({reasons}; first: "
            f"{first['source']}:{first['line']}); raise data.max_tokens, mend the rows, or raise data.max_dropped"
        )
