"""Selections on disk, and the files that trainers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradpursuit.data import Table
from gradpursuit.errors import RunError, SelectionError
from gradpursuit.files import read_json, write_atomic, write_json
from gradpursuit.selection.base import Selection

RESERVED = ("weight", "rank", "layer")


def write_selection(folder: Path, draws: list[Selection], pool: Table) -> None:
    """Write `selection.parquet` (draw, rank, id, hash, index, weight, layer) and `path.json` (the evidence).

    `path.json` is written last: a folder that has it is complete.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("draw", "rank", "id", "hash", "index", "weight", "layer")}
    for draw, selection in enumerate(draws):
        for rank, index in enumerate(selection.indices.tolist(), 1):
            row = pool[index]
            values = (draw, rank, row.id, row.hash, index, selection.weights[rank - 1], selection.layers[rank - 1])
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    with write_atomic(folder / "selection.parquet") as file:
        pq.write_table(pa.table(columns), file)
    write_json(folder / "path.json", [selection.evidence for selection in draws])


def read_selection(folder: Path, pool: Table) -> list[Selection]:
    """What :func:`write_selection` wrote, one per draw.

    Raises:
        RunError: it is missing, or its ids are not those of the pool.
    """
    try:
        columns = pq.read_table(folder / "selection.parquet").to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{folder}: no readable selection ({error}); run the selection again") from None
    evidence = read_json(folder / "path.json")
    index = np.asarray(columns["index"], dtype=np.int64)
    if any(i >= len(pool) or pool[i].id != name for i, name in zip(index.tolist(), columns["id"], strict=True)):
        raise RunError(f"{folder}: was made from another pool; run the selection again")
    draw = np.asarray(columns["draw"])
    weights, layers = np.asarray(columns["weight"], dtype=np.float64), np.asarray(columns["layer"], dtype=np.int64)
    return [
        Selection(index[draw == d], weights[draw == d], layers[draw == d], evidence[d]) for d in range(len(evidence))
    ]


def export_jsonl(path: Path, selection: Selection, pool: Table) -> None:
    """Write the chosen rows in pool order, every original column kept, plus `id`, `weight`, `rank` and `layer`."""
    order = np.argsort(selection.indices, kind="stable")
    lines = []
    for position in order.tolist():
        row = pool[int(selection.indices[position])]
        added = {
            "weight": float(selection.weights[position]),
            "rank": position + 1,
            "layer": int(selection.layers[position]),
        }
        lines.append(json.dumps({"id": row.id, **row.columns, **added}, ensure_ascii=False) + "\n")
    with write_atomic(path) as file:
        file.write("".join(lines).encode())


def refuse_reserved_columns(pool: Table) -> None:
    """The export adds columns; a pool that has them already is refused before any work is done.

    Raises:
        SelectionError: naming the first such row.
    """
    for row in pool:
        taken = [name for name in RESERVED if name in row.columns]
        if taken:
            raise SelectionError(
                f"{row.file}:{row.line}: the column '{taken[0]}' is also the name of a column that the export "
                "adds; rename it in the pool"
            )


def copies_chosen(selection: Selection, pool: Table) -> int:
    """Chosen rows that repeat another chosen row.

    Rows repeat one another if their texts are equal up to white space, or if their column `duplicate_of` names
    the same row.
    """
    roots: dict[str, str] = {}
    for row in pool:
        roots.setdefault(row.hash, row.columns.get("duplicate_of") or row.id)
    clusters = {
        pool[index].columns.get("duplicate_of") or roots[pool[index].hash] for index in selection.indices.tolist()
    }
    return len(selection.indices) - len(clusters)
