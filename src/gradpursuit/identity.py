"""What tells one model from another, without loading it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradpursuit.config import ModelSection

_SAMPLE = 1 << 20


def model_identity(config: ModelSection) -> dict[str, Any]:
    """What tells one model from another, for fingerprints: small files whole, weights by size, head and tail."""
    path = Path(config.path)
    if not path.exists():
        return {"hub": config.path, "revision": config.revision}
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return {file.name: _sampled_hash(file) for file in files if not file.name.startswith(".")}


def _sampled_hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
