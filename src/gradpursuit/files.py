"""Files and folders that are either whole or not there: written to `*.part`, renamed; or put into an object store."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gradpursuit.errors import GradPursuitError, RunError
from gradpursuit.remote import RemoteBytes, is_remote, reaching, remove_remote, write_remote

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@contextmanager
def write_atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open `path` for writing bytes; it appears under its name only when the block ends without an error.

    Errors of whatever feeds the block pass through unchanged.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    if is_remote(path):
        with write_remote(path) as file:
            yield file
        return
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if type(error).__module__ == "builtins" and isinstance(error, OSError):  # not a network library's own
            raise disk_error(error, path) from error
        raise


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; it appears as `folder`, replacing one of that name, only when the block succeeds.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if type(error).__module__ == "builtins" and isinstance(error, OSError):
            raise disk_error(error, folder) from error
        raise


@contextmanager
def kept_if_refused(files: Sequence[Path], folders: Sequence[Path]) -> Iterator[None]:
    """The `folders` are set aside; if the block refuses its settings, they and `files` become again what they were.

    A refusal is a :class:`GradPursuitError`, but no :class:`RunError` (as for a full disk), after which the same
    settings are to go on. What a killed block had set aside goes when it is entered again.
    """
    before = {path: path.read_bytes() if path.is_file() else None for path in files}
    aside = {path: path.with_name(f".{path.name}.before") for path in folders}
    for path, place in aside.items():
        shutil.rmtree(place, ignore_errors=True)
        if path.exists():
            path.rename(place)
    try:
        yield
    except GradPursuitError as error:
        if not isinstance(error, RunError):
            for path, content in before.items():
                if content is None:
                    path.unlink(missing_ok=True)
                else:
                    with write_atomic(path) as file:
                        file.write(content)
            for path, place in aside.items():
                if place.exists():
                    shutil.rmtree(path, ignore_errors=True)
                    place.rename(path)
        raise
    finally:
        for place in aside.values():
            shutil.rmtree(place, ignore_errors=True)


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
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read: {error}; delete it and run the stage again") from None


def stored_bytes(path: Path) -> NDArray[np.uint8] | RemoteBytes:
    """The bytes of a file, to be sliced: memory-mapped on a disk, fetched slice by slice from elsewhere.

    Raises:
        OSError: it cannot be read.
        RunError: it lies elsewhere and cannot be reached.
    """
    import numpy as np

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


def remove_folder(folder: Path) -> None:
    """Delete a folder and all that is in it."""
    if is_remote(folder):
        remove_remote(folder)
    else:
        shutil.rmtree(folder)


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
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from None
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
            f"{what} needs {needed / 2**20:,.0f} MiB under {folder}, where {free / 2**20:,.0f} MiB are free "
            "(64 MiB are kept in reserve); free some space or choose another folder"
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
    return RunError(f"{path}: cannot be written: {error.strerror or error}")
