"""Selections on disk: what was chosen, what smaller budgets buy of it, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gradpursuit.data import Row, Table
from gradpursuit.errors import DamagedError, RunError
from gradpursuit.files import read_json, sha256_of, write_atomic, write_json
from gradpursuit.sealed import digest_now, harm, read_sealed, write_sealed
from gradpursuit.selection.base import Selection
from gradpursuit.sources import short_names

FILES = ("selection.parquet", "path.parquet", "path.json")
CHECKSUMS = "checksums.json"
_PLACES = [("draw", pa.int64()), ("rank", pa.int64()), ("index", pa.int64())]
_WEIGHTS = [("weight", pa.float64()), ("layer", pa.int64())]
_CHOSEN = pa.schema([*_PLACES, ("id", pa.string()), ("hash", pa.string()), *_WEIGHTS])
_KEPT = pa.schema([*_PLACES, ("subset", pa.int64()), *_WEIGHTS])


def write_selection(folder: Path, draws: list[Selection], pool: Table) -> None:
    """Write `selection.parquet` (draw, rank, id, hash, index, weight, layer), the smaller budgets, and the evidence.

    The smaller budgets go to `path.parquet` (draw, subset, rank, index, weight, layer; subsets from the smallest on),
    the evidence to `path.json`. The sha256 of these three go to `checksums.json`, which is written last: a folder that
    has it is complete.
    """
    chosen = [{"draw": draw, **line} for draw, selection in enumerate(draws) for line in _lines(selection)]
    for line in chosen:
        row = pool[line["index"]]
        line.update(id=row.id, hash=row.hash)
    kept = [
        {"draw": draw, "subset": number, **line}
        for draw, selection in enumerate(draws)
        for number, subset in enumerate(selection.path, 1)
        for line in _lines(subset)
    ]
    for name, lines, schema in (("selection", chosen, _CHOSEN), ("path", kept, _KEPT)):
        with write_atomic(folder / f"{name}.parquet") as file:
            pq.write_table(pa.Table.from_pylist(lines, schema=schema), file)
    write_json(folder / "path.json", [selection.evidence for selection in draws])
    write_sealed(folder / CHECKSUMS, {"files": {name: sha256_of(folder / name) for name in FILES}})


def selection_damage(folder: Path) -> Path | None:
    """The first file of a selection that is missing, or is not what :func:`write_selection` wrote; None: all are."""
    try:
        known = read_sealed(folder / CHECKSUMS)["files"]
    except RunError:
        return folder / CHECKSUMS
    return next((folder / name for name in FILES if digest_now(folder / name) != known[name]), None)


def _lines(selection: Selection) -> list[dict[str, Any]]:
    columns = (selection.indices.tolist(), selection.weights.tolist(), selection.layers.tolist())
    return [
        {"rank": rank, "index": index, "weight": weight, "layer": layer}
        for rank, (index, weight, layer) in enumerate(zip(*columns, strict=True), 1)
    ]


def read_selection(folder: Path, pool: Table) -> list[Selection]:
    """What :func:`write_selection` wrote, one per draw.

    Raises:
        DamagedError: a file of it is missing, or is not what was written.
        RunError: its ids are not those of the pool.
    """
    if damaged := selection_damage(folder):
        raise DamagedError(damaged, harm(damaged, "was written"), "run the selection again")
    chosen, kept = _columns(folder / "selection.parquet"), _columns(folder / "path.parquet")
    evidence = read_json(folder / "path.json")
    ids = pool.ids
    named = zip(chosen["index"].tolist(), chosen["id"].tolist(), strict=True)
    if any(i >= len(pool) or ids[i] != name for i, name in named):
        raise RunError(f"{folder}: was made from another pool; run the selection again")
    return [
        replace(
            _selection(chosen, chosen["draw"] == draw),
            evidence=evidence[draw],
            path=tuple(
                _selection(kept, (kept["draw"] == draw) & (kept["subset"] == number))
                for number in np.unique(kept["subset"][kept["draw"] == draw])
            ),
        )
        for draw in range(len(evidence))
    ]


def _columns(path: Path) -> dict[str, NDArray[Any]]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path.parent}: no readable selection ({error}); run the selection again") from None
    return {name: table[name].to_numpy() for name in table.column_names}


def _selection(columns: Mapping[str, NDArray[Any]], here: NDArray[np.bool_]) -> Selection:
    return Selection(columns["index"][here], columns["weight"][here], columns["layer"][here])


def copies_chosen(selection: Selection, pool: Table) -> int:
    """Chosen rows that repeat another chosen row.

    Rows repeat one another if their texts are equal up to case and white space, or if their column `duplicate_of` names
    the same row: by its id, of their own source if that has such a row. Other values of that column name no row.
    """
    sources = dict(zip(pool.ids, pool.column("source"), strict=True))
    names = short_names(zip(pool.column("source"), pool.column("file"), strict=True))

    def named(row: Row) -> str | None:
        value = row.columns.get("duplicate_of")
        if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
            return None
        own, shared = str(value), f"{names[row.source]}/{value}"
        return shared if sources.get(own) != row.source and sources.get(shared) == row.source else own

    roots: dict[str, str] = {}
    for row in pool:
        roots.setdefault(row.hash, named(row) or row.id)
    chosen = [pool[index] for index in selection.indices.tolist()]
    return len(chosen) - len({named(row) or roots[row.hash] for row in chosen})
