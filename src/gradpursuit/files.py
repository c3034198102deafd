"""Files and folders that are either whole or not there: written beside, renamed; or put into an object store."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeGuard

from gradpursuit import aside, durable
from gradpursuit.errors import GradPursuitError, RunError
from gradpursuit.remote import RemoteBytes, is_remote, reaching, write_remote

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@contextmanager
def write_atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open `path` for writing bytes; it appears under its name only when the block ends without an error.

    Then it is on the disk, and so is its name. Whatever had the name before, a link too, is replaced and not followed.
    Errors of whatever feeds the block pass through unchanged.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    if is_remote(path):
        with write_remote(path) as file:
            yield file
        return
    part = durable.part_of(path)
    try:
        durable.make_folder(path.parent)
        with os.fdopen(durable.open_new(part), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        durable.put(part, path)
    except BaseException as error:
        durable.discard(part)
        if is_own(error):
            raise disk_error(error, path) from error
        raise


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; it appears as `folder`, replacing one of that name, only when the block succeeds.

    Then all of it is on the disk, what libraries wrote in it too. The one that is replaced is deleted last: killed in
    between, it is found again by :func:`~gradpursuit.aside.settled`.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    part = durable.part_of(folder)
    try:
        aside.settled(folder)
        durable.make_folder(part)
        yield part
        durable.sync_tree(part)
        aside.replace(part, folder)
    except BaseException as error:
        durable.discard(part)
        if is_own(error):
            raise disk_error(error, folder) from error
        raise


def is_own(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error is one of the file system, and no network library's own."""
    return type(error).__module__ == "builtins" and isinstance(error, OSError)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with write_atomic(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        RunError: the file is missing or is not JSON.
    """
    try:
        return json.loads(bytes(stored_bytes(path)[:]) if is_remote(path) else path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: not there") from None
    except OSError as error:
        raise unreadable(error, path) from None
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"{path}: damaged, it is not the JSON that was written ({error}); put it back from a copy, or move it away "
            "and run the stage again"
        ) from None


def stored_bytes(path: Path) -> NDArray[np.uint8] | RemoteBytes:
    """The bytes of a file, to be sliced: memory-mapped on a disk, fetched slice by slice from elsewhere.

    Raises:
        OSError: it cannot be read.
        RunError: it lies elsewhere and cannot be reached.
    """
    import numpy as np

    if not is_remote(path) and path.exists() and not path.is_file():  # a pipe would wait for a writer
        raise OSError(errno.EINVAL, "no plain file", str(path))
    return RemoteBytes(path) if is_remote(path) else np.memmap(path, dtype=np.uint8, mode="r")


def exists(path: Path) -> bool:
    """Whether a file is there, on a disk or elsewhere.

    Raises:
        RunError: it lies elsewhere and cannot be reached.
    """
    if not is_remote(path):
        return path.exists()
    with reaching(path):
        return path.exists()


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file's bytes.

    Raises:
        RunError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise unreadable(error, path) from None
    return digest.hexdigest()


def stamp_of(path: str) -> list[int]:
    """Size and time of change of a file, which tell a quick look that it is still the same; empty if it is gone."""
    try:
        found = Path(path).stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin work that the disk under `folder` cannot hold.

    Raises:
        RunError: fewer than `needed` bytes (and a reserve of 64 MiB) are free.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed + (64 << 20):
        raise RunError(
            f"{what} needs {ceil(needed / 2**20):,} MiB under {folder}, where {free >> 20:,} MiB are free "
            "(64 MiB are kept in reserve); free some space or choose another folder"
        )


def unreadable(error: OSError, path: Path) -> GradPursuitError:
    """The message for a failed read of `path`: what was written may be whole, so nothing is said against it."""
    return RunError(f"{path}: cannot be read: {error.strerror or error}; {_way_on(error)}")


def _way_on(error: OSError) -> str:
    ways = {
        errno.EACCES: "see that this user may read and write there",
        errno.EPERM: "see that this user may read and write there",
        errno.EROFS: "the file system is read-only: mount it for writing, or use another folder",
        errno.ENOENT: "see that the folder is there, and that its disk is mounted",
        errno.EISDIR: "a folder has the name of this file: move it away",
        errno.ENOTDIR: "a file has the name of a folder on the way there: move it away",
        errno.ELOOP: "a symbolic link stands in its place and is not followed: move the link away",
        errno.EMLINK: "the file has a second name elsewhere and is not written: move it away",
        errno.ENAMETOOLONG: "the path or a name in it is longer than names may be: choose a shorter one",
        errno.EIO: "the disk has failed to read or write: look at the log of the system",
    }
    return ways.get(
        error.errno or 0, "look at the file and its disk, then run the command again: finished work is kept"
    )


def disk_error(error: OSError, path: Path) -> GradPursuitError:
    """The message for a failed write to `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"{path}: no space left on the disk; free some and run again: finished work is kept")
    if error.errno == errno.EFBIG:
        return RunError(
            f"{path}: larger than a file may be here (`ulimit -f`, or the file system); raise the limit and run again: "
            "finished work is kept"
        )
    return RunError(f"{path}: cannot be written: {error.strerror or error}; {_way_on(error)}")
