"""What a store holds and how it was made, part by part."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gradpursuit.errors import StoreError
from gradpursuit.store.encoding import DTYPES, SCALED

VERSION = 2  # 1 did not say in a shard which checkpoint it holds
_SHOWN = 48  # characters of a value in a message


@dataclass(frozen=True)
class StoreSpec:
    """What a store holds and how its features were made; equal specs mean interchangeable rows.

    Attributes:
        ids: of the N rows, in order.
        checkpoints: T.
        dim: d.
        dtype: 'float32', 'float16', 'bfloat16' or 'int8'.
        shard_rows: rows per shard, at most 4,096.
        origin: where the features come from, in named parts (model, adapter, trajectory, data, masks, projection,
            preconditioner, precision, ...), each a JSON value that is compared and never interpreted.

    Raises:
        StoreError: `dtype` is unknown, or a part of the origin has the name of an attribute.
    """

    ids: tuple[str, ...]
    checkpoints: int
    dim: int
    dtype: str
    shard_rows: int
    origin: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise StoreError(f"store dtype {self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        if taken := self.origin.keys() & self._attributes().keys():
            raise StoreError(f"the origin of a store has parts of its own names {sorted(taken)}; rename them")

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over all parts."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the features of the whole store."""
        row = self.dim * DTYPES[self.dtype].itemsize + 4 * (self.dtype in SCALED)
        return self.checkpoints * len(self.ids) * row

    def parts(self) -> dict[str, Any]:
        """Every part of the identity by name: version, checkpoints, dim, dtype, shard_rows, ids and the origin's."""
        return {**self._attributes(), **self.origin}

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        attributes = self._attributes()
        return {"rows": len(self.ids), **attributes, "origin": dict(self.origin)}

    def shards(self) -> list[range]:
        """The rows of each shard."""
        n = len(self.ids)
        return [range(start, min(start + self.shard_rows, n)) for start in range(0, n, self.shard_rows)]

    def _attributes(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "checkpoints": self.checkpoints,
            "dim": self.dim,
            "dtype": self.dtype,
            "shard_rows": self.shard_rows,
            "ids": list(self.ids),
        }


def differences(found: Any, expected: Any, name: str = "") -> Iterator[str]:
    """Where two JSON values differ, as "projection.seed is 5, expected 6"; lists are told by their first difference.

    Keys of mappings that only `found` has count as differences. Of two sha256 only the name is told ("data differs"):
    their digits say nothing more to a person.
    """
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in sorted(found.keys() | expected.keys()):
            inner = f"{name}.{key}" if name else key
            if key not in found:
                yield f"{inner} is absent, expected {_short(expected[key])}"
            elif key not in expected:
                yield f"{inner} is {_short(found[key])}, expected to be absent"
            else:
                yield from differences(found[key], expected[key], inner)
    elif isinstance(found, (list, tuple)) and isinstance(expected, (list, tuple)):
        if len(found) != len(expected):
            yield f"{name} has {len(found):,} entries, expected {len(expected):,}"
        else:
            pairs = enumerate(zip(found, expected, strict=True))
            unequal = ((i, a, b) for i, (a, b) in pairs if a != b)
            for i, a, b in unequal:
                yield from differences(a, b, f"{name}[{i}]")
                return
    elif found == expected and isinstance(found, bool) == isinstance(expected, bool):
        return
    elif _is_sha256(found) and _is_sha256(expected):
        yield f"{name} differs"
    else:
        yield f"{name} is {_short(found)}, expected {_short(expected)}"


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
