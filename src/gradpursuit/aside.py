"""Finished work is set aside while its replacement is made, and comes back unless that becomes whole.

`RUN/.replacing.json` is written before anything is moved. It names the places that are set aside (each beside itself,
as `.NAME.gradpursuit-before`) and holds the small files that change. While it is there, the old work counts: whoever
takes the lock of the run next, after an error, an interruption, a kill or a power loss, puts all of it back
(:func:`recover`). When the replacement is whole the file is renamed to `.replaced.json`: from then on the new work
counts, and what was set aside is deleted. Each step can be repeated, so that a kill in the middle of it loses nothing.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradpursuit import durable
from gradpursuit.errors import GradPursuitError, RunError

logger = logging.getLogger("gradpursuit")
OPEN, DONE = ".replacing.json", ".replaced.json"
_FILES = {"config.yaml", "manifest.json"}  # that change with what is replaced
_open: list[Replacement] = []


def before(place: Path) -> Path:
    """Where the finished work of `place` waits."""
    return place.with_name(f".{place.name}.gradpursuit-before")


def unfinished(place: Path) -> Path:
    """Where the begun replacement of `place` waits for the next attempt, after the old work came back."""
    return place.with_name(f".{place.name}.gradpursuit-unfinished")


def is_waiting(path: Path) -> bool:
    """Whether a path lies in what was set aside, or in what is not whole yet: neither is work of the run."""
    return any(".gradpursuit-" in name or durable.is_part(Path(name)) for name in path.parts)


def _swapped(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.gradpursuit-swap")


def replace(part: Path, folder: Path) -> None:
    """Put the whole folder `part` in the place of `folder`, which is deleted last."""
    old = _swapped(folder)
    if os.path.lexists(folder):
        durable.put(folder, old)
    try:
        durable.put(part, folder)
    except BaseException:
        settled(folder)
        raise
    durable.discard(old)


def settled(folder: Path) -> None:
    """Finish, or undo, a :func:`replace` that was killed."""
    old = _swapped(folder)
    if not os.path.lexists(old):
        return
    if os.path.lexists(folder):
        durable.discard(old)
    else:
        durable.put(old, folder)


class Replacement:
    """Finished work of a run that is being replaced; made by :func:`replacing`."""

    def __init__(self, root: Path, what: str, files: Sequence[Path], *, keep_unfinished: bool) -> None:
        self._root = root
        self._value: dict[str, Any] = {
            "what": what,
            "keep_unfinished": keep_unfinished,
            "places": [],
            "files": {str(path.relative_to(root)): _text(path) for path in files},
        }
        self._write()

    def set_aside(self, place: Path, *, copy: bool = False) -> None:
        """Move the work at `place` aside, or a copy of it, from where it comes back unless this ends well."""
        if any(known["path"] == self._name(place) for known in self._value["places"]):
            return
        if any(place.is_relative_to(self._root / known["path"]) for known in self._value["places"]):
            durable.discard(place)  # a copy of the folder that holds it is aside
            return
        old = before(place)
        durable.discard(old)  # of no replacement that is known: those were put back when the lock was taken
        there = os.path.lexists(place)
        self._value["places"].append({"path": self._name(place), "there": there, "copied": copy})
        self._write()  # before anything is moved: what it names and is not set aside yet is still in its place
        if there and copy:
            part = durable.part_of(old)
            if place.is_dir():
                shutil.copytree(place, part, symlinks=True)
                durable.sync_tree(part)
            else:
                shutil.copy2(place, part, follow_symlinks=False)
                durable.sync_file(part)
            durable.put(part, old)
        elif there:
            durable.put(place, old)

    def commit(self, known: Collection[str]) -> None:
        """The new work counts now. Files set aside that are none of `known` are the user's, and are kept."""
        self._value["known"] = sorted(known)
        self._write()
        durable.put(self._root / OPEN, self._root / DONE)
        _finish(self._root, self._value)

    def _name(self, place: Path) -> str:
        return str(place.relative_to(self._root) if place.is_relative_to(self._root) else place)

    def _write(self) -> None:
        from gradpursuit.files import write_json

        write_json(self._root / OPEN, self._value)


@contextmanager
def replacing(root: Path, what: str, files: Sequence[Path], *, keep_unfinished: bool = False) -> Iterator[Replacement]:
    """While the block runs, what it sets aside and the `files` (of text) are to come back if it fails or is killed.

    Args:
        root: of the run.
        what: is replaced.
        files: small ones that the block changes.
        keep_unfinished: what was begun waits beside the old work for the next attempt, and is not deleted.
    """
    made = Replacement(root, what, files, keep_unfinished=keep_unfinished)
    _open.append(made)
    try:
        yield made
    except BaseException as error:
        refused = isinstance(error, GradPursuitError) and not isinstance(error, RunError)
        try:
            recover(root, keep_unfinished=not refused, own=True)
        except (OSError, GradPursuitError) as again:  # a full disk, say: whoever takes the lock next tries again
            logger.warning("%s: %s was set aside and comes back with the next command (%s)", root, what, again)
        raise
    finally:
        _open.remove(made)


def set_aside(place: Path) -> bool:
    """Move finished work aside within the block of :func:`replacing` that is open; False: none is."""
    if _open:
        _open[-1].set_aside(place)
    return bool(_open)


def recover(root: Path, *, keep_unfinished: bool = True, own: bool = False) -> None:
    """Put back what a replacement that did not end well had set aside, or finish one that did.

    What was begun is kept where that was asked for, unless settings were refused, with which nothing can go on.

    Args:
        root: of the run.
        keep_unfinished: whether anything can go on.
        own: this process wrote the names; those of a file that was found are obeyed only where the run writes.

    Raises:
        RunError: what names the work that was set aside is damaged, or leads out of the run.
    """
    if (root / OPEN).is_file() and not (root / OPEN).is_symlink():
        value = _read(root, OPEN, own)
        value["keep_unfinished"] = keep_unfinished and value.get("keep_unfinished", False)
        _undo(root, value)
        if value["places"]:
            logger.warning("%s: '%s' was not made again to its end; what it was before is back", root, value["what"])
    if (root / DONE).is_file() and not (root / DONE).is_symlink():
        _finish(root, _read(root, DONE, own))


def is_interrupted(root: Path) -> bool:
    """Whether :func:`recover` has something to do."""
    return (root / OPEN).is_file() or (root / DONE).is_file()


def _undo(root: Path, value: dict[str, Any]) -> None:
    from gradpursuit.files import write_text

    for known in value["places"]:
        place = root / known["path"]
        old = before(place)
        if os.path.lexists(old):
            if os.path.lexists(place) and value["keep_unfinished"]:
                durable.discard(unfinished(place))
                durable.put(place, unfinished(place))
            durable.discard(place)
            durable.put(old, place)
        elif not known["there"]:
            durable.discard(place)
    for name, text in value["files"].items():
        if text is None:
            durable.discard(root / name)
        else:
            write_text(root / name, text)
    _remove(root / OPEN)


def _finish(root: Path, value: dict[str, Any]) -> None:
    known = set(value.get("known", ()))
    for entry in value["places"]:
        place = root / entry["path"]
        old = before(place)
        if not entry["copied"] and known and place.is_relative_to(root):
            _keep_foreign(root, place, old, known)
        durable.discard(old)
        durable.discard(unfinished(place))
    _remove(root / DONE)


def _keep_foreign(root: Path, place: Path, old: Path, known: Collection[str]) -> None:
    """Files in a folder that was set aside which the run did not write are the user's: they go back."""
    for path in sorted(old.rglob("*")) if old.is_dir() and not old.is_symlink() else ():
        at = place / path.relative_to(old)
        if (
            at.relative_to(root).as_posix() in known
            or durable.is_part(path)
            or (path.is_dir() and not path.is_symlink())
        ):
            continue
        if os.path.lexists(at):
            at = at.with_name(f"{at.name}.kept-{secrets.token_hex(4)}")
        durable.make_folder(at.parent)
        durable.put(path, at)
        logger.warning("%s: this run did not write it, so it is kept", at)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    durable.sync_folder(path.parent)


def _text(path: Path) -> str | None:
    return path.read_bytes().decode("utf-8", "surrogateescape") if path.is_file() else None


def _read(root: Path, name: str, own: bool) -> dict[str, Any]:
    path = root / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        places, files = value["places"], value["files"]
        if not all(isinstance(entry["path"], str) for entry in places) or not isinstance(files, dict):
            raise TypeError("of another form")
        if not set(files) <= _FILES or not all(isinstance(text, str | None) for text in files.values()):
            raise ValueError("it names files that are none of the run's")
        if outside := [entry["path"] for entry in places if not own and not _is_ours(root, entry["path"])]:
            raise ValueError(f"it names '{outside[0]}', which is no place where this run alone writes")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path}: damaged or unreadable ({error}); nothing was changed. It names work that was set aside, which "
            "lies in folders '.NAME.gradpursuit-before': give each its NAME again, then move this file away"
        ) from None
    found: dict[str, Any] = value
    return found


def _is_ours(root: Path, name: str) -> bool:
    """Whether only this run writes at a place: in its folder, no link on the way, or in a store elsewhere that it owns.

    A run folder may come from a stranger, and what it names is deleted.
    """
    from gradpursuit.owner import is_owner

    parts, above = Path(name).parts, (root / name).parent
    if ".." in parts or not parts or "\0" in name:
        return False
    if Path(name).is_absolute():
        return any(is_owner(folder, root) for folder in (above.resolve(), *above.resolve().parents))
    return above.resolve() == root.resolve().joinpath(*parts[:-1])
