"""One shard: up to 4,096 rows of one checkpoint in a safetensors file, whole or absent.

Tensors: `features [n, d]` (F32, F16, BF16 or I8) with `scale [n]` float32 where the type needs one (see
`gradpursuit.store.encoding`), `norm [n]` float32 (of the feature before projection), `loss [n]` float32,
`tokens [n]` int32 (supervised), `row [n]` int64 (index into the ids of the manifest, ascending).

The header carries the `fingerprint` of the store, its `parts` (JSON, without the ids), the `checkpoint` (from 1), the
rows that were `dropped` (JSON, index to reason), and `sha256`: of the header without it, followed by the payload. Its
keys are sorted and nothing stands between them, so that equal content means equal bytes and no bit of a file can change
unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from gradpursuit.errors import StoreError
from gradpursuit.files import stored_bytes, write_atomic
from gradpursuit.remote import RemoteBytes
from gradpursuit.store.encoding import DTYPES, Block
from gradpursuit.store.spec import differences

TAGS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}
COLUMNS = {"norm": "F32", "loss": "F32", "tokens": "I32", "row": "I64"}
_NUMPY: dict[str, np.dtype[Any]] = {
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    **{tag: DTYPES[name] for tag, name in TAGS.items()},
}

_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    struct.error,
)  # what the bytes of any file may raise in a parser


class ShardError(StoreError):
    """A shard is missing or cannot be used; `reason` says why, without the path and without the way to mend it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}; collect the gradients again, whole shards are kept")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[ShardError], tuple[Path, str]]:
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class Columns:
    """What a shard says of its rows: as in :class:`Shard`."""

    norm: NDArray[np.float32]
    loss: NDArray[np.float32]
    tokens: NDArray[np.int32]
    row: NDArray[np.int64]
    dropped: Mapping[int, str]


@dataclass(frozen=True)
class Shard:
    """The rows of one shard at one checkpoint.

    Attributes:
        features: [n, d], float32 when it is handed to a store; as stored (memory-mapped) when it was read.
        norm, loss: float32 [n], of the feature before projection and of the row.
        tokens: int32 [n], supervised.
        row: int64 [n], index of each row, ascending.
        dropped: rows of the shard's range that were not computed, index to reason. Together with `row` they are the
            whole range.
        scale: float32 [n] by which stored features are multiplied; None for 1.
    """

    features: NDArray[Any]
    norm: NDArray[np.float32]
    loss: NDArray[np.float32]
    tokens: NDArray[np.int32]
    row: NDArray[np.int64]
    dropped: Mapping[int, str] = field(default_factory=dict)
    scale: NDArray[np.float32] | None = None

    @property
    def block(self) -> Block:
        """The features with their scale."""
        return Block(self.features, self.scale)

    def without(self, rows: Mapping[int, str]) -> Shard:
        """The shard with the rows of `rows` (index to reason) dropped."""
        keep = ~np.isin(self.row, list(rows))
        arrays = {name: getattr(self, name)[keep] for name in ("features", *COLUMNS)}
        scale = None if self.scale is None else self.scale[keep]
        gone = {i: rows[i] for i in self.row[~keep].tolist()}
        return replace(self, **arrays, scale=scale, dropped={**self.dropped, **gone})


def write_shard(
    path: Path, shard: Shard, fingerprint: str, parts: Mapping[str, Any] = MappingProxyType({}), checkpoint: int = 0
) -> None:
    """Write `shard` of a checkpoint (from 0), its features encoded already, atomically; equal content, equal bytes.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    tensors = {name: np.ascontiguousarray(getattr(shard, name)) for name in ("features", *COLUMNS)}
    if shard.scale is not None:
        tensors["scale"] = np.ascontiguousarray(shard.scale)
    metadata = {
        "fingerprint": fingerprint,
        "checkpoint": str(checkpoint + 1),
        "parts": _canonical(dict(parts)).decode(),
        "dropped": _canonical({str(row): shard.dropped[row] for row in sorted(shard.dropped)}).decode(),
    }
    file = memoryview(save(tensors, metadata=metadata))
    (length,) = struct.unpack("<Q", file[:8])
    header, payload = json.loads(bytes(file[8 : 8 + length])), file[8 + length :]
    header["__metadata__"]["sha256"] = _digest(header, payload)
    text = _padded(header)
    with write_atomic(path) as out:
        out.writelines((struct.pack("<Q", len(text)), text, payload))


def read_shard(
    path: Path,
    fingerprint: str,
    parts: Mapping[str, Any] = MappingProxyType({}),
    checkpoint: int = 0,
    *,
    verify: bool,
) -> Shard:
    """Memory-map a shard; of one that does not lie on a disk features are fetched when they are used.

    Args:
        path: the file.
        fingerprint: what its header must carry.
        parts: what the fingerprint stands for, to say how a foreign shard differs.
        checkpoint: whose rows it must hold, from 0.
        verify: read all bytes, into memory where they do not lie on a disk, and compare their sha256 with the header's.

    Raises:
        ShardError: the file is missing, truncated, corrupt, or belongs to a store made with other settings.
        RunError: it cannot be reached.
    """
    with _readable(path):
        file = _Opened(path)
        if verify:
            file.load()
        scale = file.array("scale") if "scale" in file.header else None
        columns = {name: file.array(name) for name in COLUMNS}
        shard = Shard(file.features(), **columns, dropped=file.dropped(), scale=scale)
        file.require(fingerprint, parts, checkpoint)
        return shard


def read_columns(
    path: Path, fingerprint: str, parts: Mapping[str, Any] = MappingProxyType({}), checkpoint: int = 0
) -> Columns:
    """What a shard says of its rows, without its features: a few bytes a row are read.

    Raises: as :func:`read_shard`.
    """
    with _readable(path):
        file = _Opened(path)
        columns = {name: file.array(name) for name in COLUMNS}
        found = Columns(**columns, dropped=file.dropped())
        file.require(fingerprint, parts, checkpoint)
        return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the bytes of any file may raise in a parser becomes a :class:`ShardError`."""
    try:
        yield
    except FileNotFoundError:
        raise ShardError(path, "not there") from None
    except _UNREADABLE as error:
        raise ShardError(path, f"not a whole shard ({type(error).__name__}: {error})") from None


class _Opened:
    """A shard's file: its header, and its payload as far as it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path, self._bytes = path, stored_bytes(path)
        (length,) = struct.unpack("<Q", self._bytes[:8].tobytes())
        if length > len(self._bytes):
            raise ValueError(f"a header of {length:,} bytes in a file of {len(self._bytes):,}")
        text = self._bytes[8 : 8 + length].tobytes()
        self.header: dict[str, Any] = json.loads(text)
        if text != _padded(self.header):
            raise ValueError("its header is not as it was written")
        self._start = 8 + length
        _refuse_other_length(self.header, len(self._bytes) - self._start)

    def load(self) -> None:
        """Read all bytes, which from now on are in memory or memory-mapped, and compare their sha256."""
        self._bytes = self._bytes[:]
        if self.header["__metadata__"]["sha256"] != _digest(self.header, self._bytes[self._start :].data):
            raise ShardError(self._path, "its bytes do not match their checksum")

    def array(self, name: str) -> NDArray[Any]:
        """One array, copied."""
        start, stop = self._place(name)
        return np.array(_view(self._bytes[start:stop], name, self.header[name]))

    def features(self) -> NDArray[Any]:
        """The features, where they lie."""
        start, stop = self._place("features")
        if not isinstance(self._bytes, RemoteBytes):
            return _view(self._bytes[start:stop], "features", self.header["features"])
        dtype, shape = _type_of("features", self.header["features"])
        rows: Any = self._bytes.rows(start, dtype, (shape[0], shape[1]))
        return cast("NDArray[Any]", rows)

    def _place(self, name: str) -> tuple[int, int]:
        """First and last byte of an array in the file."""
        start, stop = self.header[name]["data_offsets"]
        if not 0 <= start <= stop:
            raise ValueError(f"{name} cannot lie at {start}:{stop}")
        return self._start + start, self._start + stop

    def dropped(self) -> dict[int, str]:
        """Rows that were dropped, index to reason."""
        found = json.loads(self.header["__metadata__"]["dropped"])
        return {int(row): str(reason) for row, reason in found.items()}

    def require(self, fingerprint: str, parts: Mapping[str, Any], checkpoint: int) -> None:
        """Refuse a shard of another store, or of another checkpoint."""
        metadata = self.header["__metadata__"]
        found = json.loads(metadata["parts"])
        if metadata["fingerprint"] != fingerprint:
            raise ShardError(self._path, f"it was made with other settings than its store ({_first(found, parts)})")
        if metadata["checkpoint"] != str(checkpoint + 1):
            raise ShardError(self._path, f"it holds checkpoint {metadata['checkpoint']}, not {checkpoint + 1}")


def _first(found: Any, expected: Mapping[str, Any]) -> str:
    return next(differences(found, json.loads(_canonical(dict(expected)))), "other ids")


def _refuse_other_length(header: dict[str, Any], length: int) -> None:
    wanted = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    if wanted != length:
        raise ValueError(f"{length:,} bytes follow the header, which says {wanted:,}")


def _view(part: NDArray[np.uint8], name: str, entry: dict[str, Any]) -> NDArray[Any]:
    dtype, shape = _type_of(name, entry)
    return part.view(dtype).reshape(shape)


def _type_of(name: str, entry: dict[str, Any]) -> tuple[np.dtype[Any], list[int]]:
    """Type and shape of an array, if its place in the file has their size."""
    expected = {**COLUMNS, "scale": "F32"}.get(name)
    if entry["dtype"] != expected and not (name == "features" and entry["dtype"] in TAGS):
        raise ValueError(f"{name} is {entry['dtype']}, expected {expected or ' or '.join(TAGS)}")
    dtype, shape, (start, stop) = _NUMPY[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} cannot lie at {start}:{stop}")
    return dtype, shape


def _digest(header: Mapping[str, Any], payload: memoryview) -> str:
    metadata = {name: value for name, value in header["__metadata__"].items() if name != "sha256"}
    digest = hashlib.sha256(_canonical({**header, "__metadata__": metadata}))
    digest.update(payload)
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _padded(header: Any) -> bytes:
    """The header as it stands in a file: arrays begin at a multiple of 8 bytes."""
    text = _canonical(header)
    return text + b" " * (-len(text) % 8)
