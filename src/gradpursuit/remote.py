"""Places that are not on a disk of this machine: whatever `fsspec` reaches by a URL, such as `s3://bucket/folder`.

A remote place is a `UPath` of `universal_pathlib`, which has the face of a :class:`~pathlib.Path`. Keys and endpoints
are those of the environment of each machine (for S3 AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, a
profile or a role), never part of a URL, so that they are in no configuration and no log.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from gradpursuit import durable
from gradpursuit.errors import ConfigError, GradPursuitError, RunError
from gradpursuit.shown import without_secrets

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_HEAD = 256 * 2**10  # bytes that hold the header of a shard and mostly all but its features


def is_url(text: str) -> bool:
    """Whether `text` names a remote place, and not a path."""
    return "://" in text


def located(text: str | None) -> str | None:
    """A URL as it is, a path made absolute."""
    return text if text is None or is_url(text) else str(absolute(text))


def absolute(text: str) -> Path:
    """A path made absolute, `~` and links followed.

    Raises:
        ConfigError: it leads nowhere: a home folder of nobody, links that lead to themselves.
    """
    try:
        return Path(text).expanduser().resolve()
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(f"{text}: no usable path: {error}") from None


def is_remote(path: Path) -> bool:
    """Whether a place, made by :func:`place`, is not on a disk."""
    return not isinstance(path, Path)


def require_no_secrets(text: str, what: str) -> str:
    """`text`, a URL or an address, if it carries no user, password or signature.

    Raises:
        ValueError: it does; the message does not repeat it.
    """
    if re.search(r"[@?#]", text.partition("://")[2] or text):
        raise ValueError(
            f"{what} must not hold a user, password, key or signature ('@', '?' or '#'): it is written into files and "
            "logs; put credentials into the environment or the credentials file of every machine instead"
        )
    return text


def place(text: str) -> Path:
    """The path or URL as something with the face of a `Path`.

    Raises:
        ConfigError: what reaches that kind of URL is not installed, or there is no such kind.
    """
    if not is_url(text):
        return Path(text)
    try:
        from upath import UPath

        # Other machines write there too: a listing remembered here would be an old one.
        made = UPath(text, use_listings_cache=False)
        made.fs  # noqa: B018  # made at first use, which is when something is found missing
    except ImportError as error:
        raise ConfigError(
            f"'{text}' needs a package that is not installed ({error}); pip install 'gradpursuit[ray]', for S3 also "
            "s3fs, for Google Cloud gcsfs, for Azure adlfs"
        ) from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"'{text}' is no place that can be written to: {error}") from None
    return cast(Path, made)


def require_reached(folder: Path) -> None:
    """See that a folder to write to is there, or can be made.

    Raises:
        RunError: it cannot.
    """
    if is_remote(folder):
        with reaching(folder):
            folder.exists()
        return
    try:
        durable.make_folder(folder)
    except OSError as error:
        raise RunError(f"{folder}: this folder cannot be made: {error.strerror or error}; choose another one") from None
    if not os.access(folder, os.W_OK):
        raise RunError(f"{folder}: this folder cannot be written; choose another one")


class RemoteBytes:
    """The bytes of a remote file, of which only the first and the slices asked for are fetched.

    Raises:
        FileNotFoundError: it is not there.
        RunError: it cannot be reached.
    """

    def __init__(self, path: Path) -> None:
        self._path: Any = path
        with reaching(path):
            self._length = int(self._path.stat().st_size)
        self._head = _fetched(path, 0, min(_HEAD, self._length))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> NDArray[np.uint8]:
        import numpy as np

        start, stop, _ = part.indices(self._length)
        if stop <= start:
            return np.empty(0, dtype=np.uint8)
        return self._head[start:stop] if stop <= len(self._head) else _fetched(self._path, start, stop)

    def rows(self, start: int, dtype: np.dtype[Any], shape: tuple[int, int]) -> RemoteRows:
        """The array [n, d] that begins at byte `start`, not fetched yet."""
        return RemoteRows(self._path, start, dtype, shape)


class RemoteRows:
    """Rows [n, d] of a remote file that are fetched when they are made an array, and not before.

    path: the file. start: where the first row begins in it. dtype, shape: of the array of all rows.
    """

    def __init__(self, path: Path, start: int, dtype: np.dtype[Any], shape: tuple[int, int]) -> None:
        self._path, self._start = path, start
        self.dtype, self.shape, self.ndim = dtype, shape, 2
        self._row_bytes = shape[1] * dtype.itemsize
        self.nbytes = shape[0] * self._row_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice | int) -> RemoteRows | NDArray[Any]:
        """Some rows, not fetched yet; or one, fetched [d]."""
        if not isinstance(part, slice):
            row: NDArray[Any] = self[part : part + 1].__array__()[0]
            return row
        first, stop, _ = part.indices(len(self))
        start = self._start + first * self._row_bytes
        return RemoteRows(self._path, start, self.dtype, (max(0, stop - first), self.shape[1]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Fetched."""
        found = _fetched(self._path, self._start, self._start + self.nbytes).view(self.dtype).reshape(self.shape)
        return found if dtype is None else found.astype(dtype, copy=False)

    def astype(self, dtype: Any) -> NDArray[Any]:
        """Fetched, and converted."""
        return self.__array__().astype(dtype)


def _fetched(path: Any, start: int, stop: int) -> NDArray[np.uint8]:
    import numpy as np

    with reaching(path):
        found = np.frombuffer(path.fs.cat_file(path.path, start=start, end=stop), dtype=np.uint8)
    if len(found) != stop - start:
        raise ValueError(f"{len(found):,} of {stop - start:,} bytes came back")
    return found


@contextmanager
def write_remote(path: Path) -> Iterator[IO[bytes]]:
    """A file in memory that is put in its place, in one piece, when the block ends without an error.

    Raises:
        RunError: it cannot be written.
    """
    file = io.BytesIO()
    yield file
    where: Any = path
    with reaching(path):
        where.fs.makedirs(where.parent.path, exist_ok=True)
        where.fs.pipe_file(where.path, file.getvalue())


@contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Whatever a library for remote files raises, but that there is no such file, becomes a :class:`RunError`.

    Of a place on a disk nothing is changed.
    """
    try:
        yield
    except (FileNotFoundError, GradPursuitError):
        raise
    except Exception as error:  # each library has errors of its own, some no OSError
        if not is_remote(path):
            raise
        reason = without_secrets(f"{type(error).__name__}: {error}")
        raise RunError(
            f"{path}: cannot be reached: {reason}; look at the credentials and the endpoint in the environment of this "
            "machine. Finished work is kept"
        ) from None
