"""One store elsewhere, one run: `owner.json` in the folder of `gradients.store` names the run that writes there.

It holds the random id of the run (`run.json` of its folder) and where that was. A run that was moved is still the
owner; a copy of it is not, as long as the original is where it was. Whoever reads a store need not own it.
"""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradpursuit import durable, marker
from gradpursuit.errors import RunError, StoreError
from gradpursuit.files import exists, read_json, write_json
from gradpursuit.remote import is_remote, reaching, require_reached

NAME = "owner.json"
_RUN = {"data", "trajectory", "selection", "evaluation", "exports", "targets", "input"}
_OWN = {"pool", "target", "targets", NAME}


def claim(store: Path, run: Path) -> None:
    """Make the run in the folder `run`, whose lock is held, the owner of the folder `store`.

    Raises:
        StoreError: it belongs to another run, lies in one, or holds something that is no store.
        RunError: it cannot be read or written.
    """
    mine = {"run": marker.run_id(run), "folder": str(run), "host": socket.gethostname()}
    if not is_remote(store):
        _refuse_within(store, run)
        if store.resolve().is_relative_to(run.resolve()):
            return
    if not exists(store / NAME):
        _refuse_foreign(store)
        _write_new(store / NAME, mine)
    found = read_json(store / NAME)
    if not isinstance(found, dict) or set(found) != set(mine) or not all(isinstance(v, str) for v in found.values()):
        raise StoreError(f"{store / NAME}: damaged: it does not name the run that owns this store; {_WAY_ON}")
    if found == mine:
        return
    where = f"the run in {found['folder']} on {found['host']}"
    if found["run"] != mine["run"]:
        raise StoreError(
            f"{store}: belongs to {where}, and one store has one run; nothing was changed. Give this run a "
            f"gradients.store of its own. {_WAY_ON}"
        )
    if _is_still_there(found, run):
        raise StoreError(
            f"{store}: belongs to {where}, of which {run} is a copy; nothing was changed. Give the copy a "
            "gradients.store of its own (a copy of this one, if its features are to be kept)"
        )
    write_json(store / NAME, mine)


def is_owner(folder: Path, run: Path) -> bool:
    """Whether a folder on a disk is a store that the run in the folder `run` owns; a copy of that run does not."""
    with suppress(OSError, RunError):
        found = read_json(folder / NAME) if (folder / NAME).is_file() else None
        mine = marker.known_id(run)
        if isinstance(found, dict) and mine is not None and found.get("run") == mine:
            return all(isinstance(found.get(key), str) for key in ("folder", "host")) and not _is_still_there(
                found, run
            )
    return False


_WAY_ON = f"If that run is gone for good and its features may be replaced, move {NAME} away and run again"


def _is_still_there(owner: dict[str, Any], run: Path) -> bool:
    """Whether the run is also where the owner says, and not only in `run`."""
    other = Path(owner["folder"])
    if owner["host"] != socket.gethostname() or marker.known_id(other) != owner["run"]:
        return False
    with suppress(OSError):
        return not other.samefile(run)
    return False


def _refuse_within(store: Path, run: Path) -> None:
    place = store.resolve()
    for folder in (place, *place.parents):
        if folder == run.resolve():
            inside = place.relative_to(folder).parts
            if not inside or inside[0] in (
                "data",
                "trajectory",
                "selection",
                "evaluation",
                "exports",
                "targets",
                "input",
            ):
                raise StoreError(f"gradients.store: {store} is a folder that the run uses otherwise; name another one")
            return
        if marker.is_run(folder):
            raise StoreError(
                f"gradients.store: {store} lies in another run, {folder}; nothing was changed. Name a folder of its own"
            )
        if folder != place and (folder / NAME).is_file() and {p.name for p in folder.iterdir()} <= _OWN:
            raise StoreError(
                f"gradients.store: {store} lies in the store of another run, {folder}; name another folder"
            )


def _refuse_foreign(store: Path) -> None:
    """A folder that holds anything must hold stores alone."""
    with reaching(store):
        names = sorted(path.name for path in store.iterdir()) if store.exists() else []
    others = [name for name in names if name not in _OWN and not durable.is_part(Path(name))]
    if not others and names:
        with reaching(store):
            stores = list(store.glob("*/*/manifest.json")) + list(store.glob("targets/*/*/*/manifest.json"))
        others = [] if stores or all(durable.is_part(Path(name)) for name in names) else names
    if others:
        raise StoreError(
            f"gradients.store: {store} holds something else ('{others[0]}'); nothing was changed. Name an empty "
            "or a new folder"
        )


def _write_new(path: Path, value: dict[str, Any]) -> None:
    """Write a file unless there is one by now: of two runs that begin at once one is the owner."""
    require_reached(path.parent)
    if is_remote(path):
        write_json(path, value)
        return
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    write_json(part, value)
    try:
        os.link(part, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        durable.put(part, path)
        return
    part.unlink()
    durable.sync_folder(path.parent)
