"""One shard: up to 4,096 rows of one checkpoint in a safetensors file, whole or absent.

Tensors: `features [n, d]` (float32 or float16), `norm [n]` float32 (of the feature before projection),
`loss [n]` float32, `tokens [n]` int32 (supervised), `row [n]` int64 (index into the ids of the manifest).
The header carries the fingerprint of the store and the sha256 of the arrays' bytes, in name order.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from gradpursuit.errors import StoreError
from gradpursuit.files import write_atomic

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
NAMES = ("features", "loss", "norm", "row", "tokens")
KINDS = {"loss": "F32", "norm": "F32", "row": "I64", "tokens": "I32"}


@dataclass(frozen=True)
class Shard:
    """The arrays of one shard, `features` memory-mapped when it was read from disk."""

    features: NDArray[Any]
    norm: NDArray[np.float32]
    loss: NDArray[np.float32]
    tokens: NDArray[np.int32]
    row: NDArray[np.int64]

    def digest(self) -> str:
        """sha256 (hex) over the bytes of the arrays, in name order."""
        digest = hashlib.sha256()
        for name in NAMES:
            digest.update(np.ascontiguousarray(getattr(self, name)).data)
        return digest.hexdigest()


def write_shard(path: Path, shard: Shard, fingerprint: str) -> None:
    """Write `shard` atomically.

    Raises:
        StoreError: a feature is not finite or a row is all zeros; nothing is written.
    """
    features = np.asarray(shard.features)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        bad = shard.row[~finite][:5].tolist()
        raise StoreError(
            f"{path}: {int((~finite).sum())} rows are not finite in {features.dtype} (first: {bad}); "
            "use gradients.store_dtype: float32 or model.precision: float32"
        )
    zero = ~features.any(axis=1)
    if zero.any():
        raise StoreError(f"{path}: {int(zero.sum())} rows are all zeros (first: {shard.row[zero][:5].tolist()})")
    tensors = {name: np.ascontiguousarray(getattr(shard, name)) for name in NAMES}
    payload = save(tensors, metadata={"fingerprint": fingerprint, "sha256": shard.digest()})
    with write_atomic(path) as file:
        file.writelines(_in_order(payload))


def _in_order(payload: bytes) -> tuple[bytes, memoryview]:
    """A safetensors file with its header's keys sorted: the library writes metadata in an order that varies."""
    (length,) = struct.unpack("<Q", payload[:8])
    header = json.dumps(json.loads(payload[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header, memoryview(payload)[8 + length :]


def read_shard(path: Path, fingerprint: str, *, verify: bool) -> Shard:
    """Memory-map a shard.

    Args:
        path: the file.
        fingerprint: what its header must carry.
        verify: read all bytes and compare their sha256 with the header's.

    Raises:
        StoreError: the file is truncated, corrupt, or belongs to a store made with other settings.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("header is longer than the file")
            header = json.loads(file.read(length))
        found, checksum = (header["__metadata__"][name] for name in ("fingerprint", "sha256"))
        arrays = {name: _map(path, 8 + length, name, header[name]) for name in NAMES}
    except FileNotFoundError:
        raise StoreError(f"{path}: not there; collect the gradients again, finished shards are kept") from None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, struct.error) as error:
        raise StoreError(f"{path}: not a whole shard ({type(error).__name__}: {error})") from None
    if found != fingerprint:
        raise StoreError(f"{path}: was made with other settings than its store")
    shard = Shard(arrays["features"], *(np.array(arrays[name]) for name in ("norm", "loss", "tokens", "row")))
    if verify and shard.digest() != checksum:
        raise StoreError(f"{path}: its bytes do not match their checksum; delete it and collect again")
    return shard


def _map(path: Path, start: int, name: str, entry: dict[str, Any]) -> NDArray[Any]:
    if entry["dtype"] != KINDS.get(name, entry["dtype"]):
        raise ValueError(f"{name} is {entry['dtype']}, expected {KINDS[name]}")
    begin, end = entry["data_offsets"]
    if start + end > path.stat().st_size:
        raise ValueError("file is shorter than its header says")
    shape = tuple(entry["shape"])
    return np.memmap(path, dtype=DTYPES[entry["dtype"]], mode="r", offset=start + begin, shape=shape)
