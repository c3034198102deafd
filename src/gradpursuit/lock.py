"""One writer at a time: the lock of a run folder, and of a cache that processes share.

The lock is the operating system's (`flock` on `RUN/.lock`), so it ends with the process that holds it, however that
ends: a lock cannot outlive a kill, a power loss or a restart, and no process number is ever taken for another's. The
file also says who holds it; what it still says when nobody holds the lock tells of an owner that was killed.

Where it reaches: every process of one machine, containers on one folder included; processes of other machines where
the file system carries locks across them (NFS, GPFS, CephFS and Lustre as they are usually mounted). Mounted with
locks of their own machine only (NFS `local_lock`, Lustre `localflock`), two machines are not kept apart; on a file
system without locks nobody is, and a warning says so.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

from gradpursuit import durable, marker
from gradpursuit.errors import RunError
from gradpursuit.files import disk_error, is_own

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("gradpursuit")
NAME = ".lock"
_PATIENCE = 0.5  # seconds: a look at the lock, as `status` takes, holds it for an instant
_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock: process number, machine, the time since (ISO 8601, UTC) and the command."""

    pid: int
    host: str
    since: str
    command: str

    @classmethod
    def this(cls) -> Owner:
        """This process, now."""
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        return cls(os.getpid(), socket.gethostname(), datetime.now(timezone.utc).isoformat(timespec="seconds"), command)

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, since {self.since} ({self.command})"


class RunLock:
    """The lock of a run folder, as a context manager that may be entered again while it is held.

    Entering makes the folder if there is none (`created` tells). An owner that was killed is told of in a warning.

    What an interrupted process had set aside is put back, and what it left half-written is deleted.

    Raises:
        RunError: another process holds the lock (it is named), the folder cannot be written, or it is not empty and no
            run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.created = folder, False
        self._parents: list[Path] = []  # made for it, from below
        self._file: int | None = None
        self._depth = 0

    def __enter__(self) -> RunLock:
        if self._file is None:
            try:
                self._file = self._acquire()
            except OSError as error:
                raise disk_error(error, self.folder / NAME if error.filename else self.folder) from error
            try:
                marker.run_id(self.folder)
                marker.clean(self.folder)
            except BaseException as error:
                self._release()
                if is_own(error):
                    raise disk_error(error, self.folder) from error
                raise
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._release()

    def _release(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.ftruncate(self._file, 0)  # nobody's; the file stays, for whoever waits for it has it open
            os.close(self._file)
            self._file = None

    def discard_folder(self) -> None:
        """Delete the folder, and those made above it; one that another process makes there meanwhile is left alone.

        So is one that somebody put something else into.
        """
        with suppress(OSError):
            if {path.name for path in self.folder.iterdir() if not durable.is_part(path)} - marker.OWN:
                return
        gone = self.folder.with_name(f".{self.folder.name}.{os.getpid()}")
        with suppress(OSError):
            self.folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            for parent in self._parents:
                parent.rmdir()  # fails, and ends it, where there is something else

    def _acquire(self) -> int:
        deadline = time.monotonic() + _PATIENCE
        while True:
            file = self._open()
            try:
                locked = _lock(file, shared=False)
                if locked is not False and self._is_in_place(file):
                    self._tell(file, supported=locked is not None)
                    os.ftruncate(file, 0)
                    os.pwrite(file, json.dumps(asdict(Owner.this())).encode(), 0)
                    return file
                if time.monotonic() > deadline:
                    raise RunError(self._refusal(file))
            except BaseException:
                os.close(file)
                raise
            os.close(file)
            time.sleep(0.02)

    def _open(self) -> int:
        self._require_ours()
        made = durable.make_folder(self.folder)
        if made and made[-1] == self.folder:
            self.created, self._parents = True, made[-2::-1]
        return durable.open_own(self.folder / NAME, os.O_RDWR)

    def _require_ours(self) -> None:
        """As :func:`marker.require_ours`, but a lock that was made this instant may be about to say whose it is."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                return marker.require_ours(self.folder)
            except RunError:
                with suppress(OSError):
                    if [path.name for path in self.folder.iterdir()] == [NAME] and time.monotonic() < deadline:
                        time.sleep(0.02)
                        continue
                raise

    def _is_in_place(self, file: int) -> bool:
        """Whether the file is still the one in the folder, and not that of a folder just deleted."""
        try:
            return os.path.samestat(os.fstat(file), (self.folder / NAME).stat())
        except FileNotFoundError:
            return False

    def _tell(self, file: int, *, supported: bool) -> None:
        if not supported:
            logger.warning(
                "%s: this file system has no locks, so nothing keeps a second process out; start only one", self.folder
            )
        if os.fstat(file).st_size:
            logger.warning(
                "%s: taking over the lock of %s, which ended without releasing it; its finished work is kept",
                self.folder,
                _read(file) or "an unknown process",
            )

    def _refusal(self, file: int) -> str:
        owner = _read(file)
        end = f"end it (`kill {owner.pid}` on {owner.host})" if owner else "end it"
        return (
            f"{self.folder}: another process is at work in this run folder: {owner or 'it does not say which'}. "
            f"Nothing was changed. Wait for it (`gradpursuit status {shlex.quote(str(self.folder))}` shows "
            f"how far it is), {end}, "
            "or choose another run folder"
        )


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that processes share, such as a cache; while another holds it, wait.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        durable.make_folder(folder)
        file = durable.open_own(folder / NAME, os.O_RDWR)
    except OSError as error:
        raise disk_error(error, folder) from error
    try:
        if _lock(file, shared=False) is False:
            logger.info("%s: another process is filling this folder; waiting for it", folder)
            while _lock(file, shared=False) is False:
                time.sleep(0.05)
        yield
    finally:
        os.close(file)  # the lock goes with it


def holder(folder: Path) -> Owner | None:
    """Who is at work in `folder` now; None: nobody. Changes nothing."""
    try:
        file = os.open(folder / NAME, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError):  # ValueError: no folder has such a name
        return None
    try:
        free = _lock(file, shared=True)
        owner = _read(file)
    finally:
        os.close(file)
    if free is None:  # a file system without locks: what the file says is all there is
        return owner
    return None if free else owner or Owner(0, "an unknown machine", "an unknown time", "it does not say")


def _lock(file: int, *, shared: bool) -> bool | None:
    """Try to lock, without waiting. False: another process has it; None: there are no locks here."""
    try:
        if sys.platform == "win32":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _read(file: int) -> Owner | None:
    try:
        owner = Owner(**json.loads(os.pread(file, 1 << 16, 0)))
        datetime.fromisoformat(owner.since)
    except (ValueError, TypeError, RecursionError):
        return None
    whole = type(owner.pid) is int and isinstance(owner.host, str) and isinstance(owner.command, str)
    return owner if whole else None
