"""What a power loss cannot take back: contents reach the disk before the names that lead to them.

A rename is kept only when the folder that holds the name is written too, and a new folder only when its parent is. On
a file system (or a system) that cannot write folders so, there is nothing that can be done, and nothing is.

Temporary names are drawn at random and made for this process alone, so that nobody can lay a link in their place.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_NOT_HERE = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS)
_PART = re.compile(r".+\.[0-9a-f]{16}\.part", re.DOTALL)


def part_of(path: Path) -> Path:
    """A name beside `path` for what is not whole yet; no two are alike, and nobody can foresee one."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")


def is_part(path: Path) -> bool:
    """Whether a path has a name that :func:`part_of` makes."""
    return _PART.fullmatch(path.name) is not None


def open_new(path: Path) -> int:
    """Open a file that is not there yet for writing; a link in its place is no place to write to.

    Raises:
        OSError: something has that name, or the folder cannot be written.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _BINARY, 0o666)


def open_own(path: Path, flags: int) -> int:
    """Open a file of ours to change it in place (`flags` as of :func:`os.open`); it is made if it is not there.

    Raises:
        OSError: it is a symbolic link (ELOOP), has another name elsewhere (EMLINK), or is no plain file (EINVAL).
    """
    # A pipe without a reader would block the opening.
    file = os.open(path, flags | os.O_CREAT | _NOFOLLOW | _BINARY | getattr(os, "O_NONBLOCK", 0), 0o666)
    found = os.fstat(file)
    wrong = 0 if stat.S_ISREG(found.st_mode) else errno.EINVAL
    if found.st_nlink > 1:
        wrong = errno.EMLINK
    if wrong:
        os.close(file)
        raise OSError(wrong, "it is a link to another file, or no plain file; remove it", str(path))
    return file


def sync_folder(folder: Path) -> None:
    """See that the names in `folder` are on the disk."""
    if sys.platform == "win32":
        return
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # may be written but not read: nothing can be done
        return
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    finally:
        os.close(file)


def sync_file(path: Path) -> None:
    """See that the content of a file that a library wrote is on the disk."""
    file = os.open(path, (os.O_RDWR if sys.platform == "win32" else os.O_RDONLY) | _BINARY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_tree(folder: Path) -> None:
    """See that everything below `folder` is on the disk, files before the folders that hold them; links are passed."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                sync_file(path)
        sync_folder(Path(place))


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it, each of them on the disk in the one that holds it.

    Returns:
        The folders that were made, the deepest last.
    """
    made: list[Path] = []
    for path in [*reversed(folder.parents), folder]:
        if path.is_dir():
            continue
        try:
            path.mkdir()
        except FileExistsError:
            if not path.is_dir():
                raise
            continue
        made.append(path)
        sync_folder(path.parent)
    return made


def put(part: Path, path: Path) -> None:
    """Give a file or folder whose content is on the disk its name, and see that the name is on the disk as well."""
    part.replace(path)
    sync_folder(path.parent)
    if part.parent != path.parent:
        sync_folder(part.parent)


def discard(path: Path) -> None:
    """Delete a file or a folder; of a link the link alone. What cannot be deleted stays."""
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def leftovers(folder: Path) -> Iterator[Path]:
    """What a killed process left half-written in `folder` itself."""
    with suppress(OSError):
        yield from [path for path in folder.iterdir() if is_part(path)]
