"""How many rows of gradient stores are finished, by the names and sizes of their files: nothing is read whole."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def finished_rows(folder: Path, labels: Sequence[str], made_with: Mapping[str, Any]) -> int:
    """Rows × checkpoints whose shards are there in every store `folder/<label>`.

    Args:
        folder: of a split.
        labels: names of the stores; without any, nothing is counted.
        made_with: values that the manifest of a store must have (those in its `origin` included) to be counted.
    """
    found = [_shards(folder / label, made_with) for label in labels]
    if not found:
        return 0
    common = set.intersection(*(set(shards) for shards in found))
    return sum(found[0][shard] for shard in common)


def _shards(store: Path, made_with: Mapping[str, Any]) -> dict[tuple[int, int], int]:
    """Rows of every whole shard, by checkpoint and number."""
    try:
        manifest = json.loads((store / "manifest.json").read_text(encoding="utf-8"))
        found = manifest.pop("fingerprint")
        if found != hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest():
            return {}  # damaged: no number in it can be relied on
        rows, size, checkpoints = (int(manifest[name]) for name in ("rows", "shard_rows", "checkpoints"))
        known = {**manifest["origin"], **manifest}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    if any(known.get(name) != value for name, value in made_with.items()):
        return {}
    return {
        (t, s): min(size, rows - s * size)
        for t in range(checkpoints)
        for s in range(-(-rows // size))
        if _is_whole(store / f"checkpoint-{t + 1}" / f"shard-{s:05d}.safetensors")
    }


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is there and as long as its header says."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size
            header = json.loads(file.read(length)) if length <= size else {}
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error):
        return False
    return bool(ends) and size == 8 + length + max(ends)
