"""Files that carry a checksum of themselves, so that one changed bit is found whenever they are read.

A sealed JSON file is an object whose last key `sha256` is that of the object without it, in exactly the text that this
module writes. A sealed text ends with a comment line that holds the sha256 of the lines above it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradpursuit.errors import DamagedError, RunError
from gradpursuit.files import sha256_of, unreadable, write_text

SEAL = "sha256"
_LINE = "# sha256 of the lines above: "
_SETTLED = 2.0  # seconds
_digests: dict[tuple[Any, ...], str] = {}


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, atomically.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    write_text(path, _dumped({**value, SEAL: _seal(value)}))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what :func:`write_sealed` wrote, without the checksum.

    Raises:
        DamagedError: the file is missing, is no plain file, or differs in any byte from what was written.
    """
    return unsealed(path, *parse(path))


def unsealed(path: Path, value: Any, text: str) -> dict[str, Any]:
    """The value of a sealed file, whose `text` was read and parsed already, without the checksum.

    Raises:
        DamagedError: `text` differs in any byte from what was written.
    """
    found = value.pop(SEAL, None) if isinstance(value, dict) else None
    try:
        whole = isinstance(value, dict) and found == _seal(value) and text == _dumped({**value, SEAL: found})
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError(path, "its contents do not match the checksum in it")
    made: dict[str, Any] = value
    return made


def parse(path: Path) -> tuple[Any, str]:
    """The JSON value and the text of a file, whatever its checksum says.

    Raises:
        DamagedError: it is missing, is no plain file, or is not JSON.
        RunError: it cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DamagedError(path, "it is no plain file")
        text = path.read_bytes().decode("utf-8")
        return json.loads(text), text
    except FileNotFoundError:
        raise DamagedError(path, "it is missing") from None
    except OSError as error:
        raise unreadable(error, path) from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"it is not the JSON that was written ({error})") from None


def sealed_text(text: str) -> str:
    """`text` with the line that holds its checksum."""
    return f"{text}{_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n"


def is_sealed_text(path: Path) -> bool:
    """Whether a file is, byte for byte, what :func:`sealed_text` made."""
    try:
        content = path.read_bytes() if path.is_file() else b""
        text, line, _ = content.decode("utf-8").rpartition(_LINE)
    except (OSError, ValueError):
        return False
    return bool(line) and content == sealed_text(text).encode()


def harm(path: Path, wrote: str) -> str:
    """What has happened to a file that is not what it should be: "missing", or that it is not what `wrote` says."""
    return f"not what {wrote}" if os.path.lexists(path) else "missing"


def digest_now(path: Path) -> str | None:
    """sha256 of a plain file; None if there is none, or it cannot be read.

    This process does not read a file again whose inode, size and times stay the same, unless it changed a moment ago:
    a second change within one tick of the file system's clock leaves no trace.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return None
        key = (str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        digest = _digests.get(key) or sha256_of(path)
    except (OSError, ValueError, RunError):
        return None
    if time.time() - max(found.st_mtime, found.st_ctime) > _SETTLED:
        _digests[key] = digest
    return digest


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dumped(value).encode()).hexdigest()


def _dumped(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
