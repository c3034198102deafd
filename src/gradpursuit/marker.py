"""What makes a folder a run of this program: `run.json`, written before anything else, with the random id of the run.

A folder that holds anything but has neither this file nor a manifest of ours is not touched. A run that is moved stays
the same run; a copy has the id of what it was copied from, and so cannot write to a store elsewhere that belongs to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

from gradpursuit import aside, durable
from gradpursuit.errors import RunError

NAME = "run.json"
_BEGUN = {".lock"}
OWN = {  # whatever a run has in its folder
    NAME, ".lock", "log.txt", "config.yaml", "manifest.json", "progress.json", "report.html", "report.json", "input",
    "data", "trajectory", "gradients", "selection", "evaluation", "exports", "targets",
}  # fmt: skip


def require_ours(folder: Path) -> None:
    """See that `folder` is a run, or that there is nothing in it yet.

    Raises:
        RunError: it holds something else, or cannot be read.
    """
    from gradpursuit.files import disk_error

    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except FileNotFoundError:
        return
    except OSError as error:
        raise disk_error(error, folder) from None
    if not [name for name in names if not durable.is_part(Path(name)) and not _is_own_lock(folder, name)]:
        return
    if os.path.lexists(folder / NAME) and _marked(folder) is not None:
        return
    if _has_manifest(folder):
        return
    shown = ", ".join(f"'{name}'" for name in names[:3]) + (" …" if len(names) > 3 else "")
    raise RunError(
        f"{folder}: not empty, and no run of gradpursuit (it holds {shown}); nothing was written. Give the run a "
        "folder of its own: --run-dir with a new name"
    )


def run_id(folder: Path) -> str:
    """The random id of the run in `folder`, made when there is none yet; the lock of the run must be held.

    Raises:
        RunError: its file is damaged.
    """
    from gradpursuit.files import write_json

    if not os.path.lexists(folder / NAME):
        name = secrets.token_hex(16)
        write_json(folder / NAME, {"gradpursuit": "run", "id": name, "sha256": _digest(name)})
        return name
    if (found := _marked(folder)) is None:
        raise RunError(
            f"{folder / NAME}: damaged; put it back from a copy, or move it away: the run then gets a new id, and a "
            "store elsewhere (gradients.store) that belongs to it is refused"
        )
    return found


def known_id(folder: Path) -> str | None:
    """The id of the run in `folder`; None: no run is there, or it has none yet."""
    return _marked(folder)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run, as far as can be seen."""
    return _marked(folder) is not None or _has_manifest(folder)


def is_whole(folder: Path) -> bool:
    """Whether the id of the run is, byte for byte, what was written."""
    path = folder / NAME
    name = _marked(folder)
    if name is None or path.is_symlink():
        return False
    value = {"gradpursuit": "run", "id": name, "sha256": _digest(name)}
    return path.read_bytes() == (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _marked(folder: Path) -> str | None:
    value = _json(folder / NAME)
    if value is None or value.get("gradpursuit") != "run":
        return None
    name = value.get("id")
    return (
        name if isinstance(name, str) and value == {"gradpursuit": "run", "id": name, "sha256": _digest(name)} else None
    )


def _has_manifest(folder: Path) -> bool:
    value = _json(folder / "manifest.json")
    # A store has a manifest too, of other keys.
    return value is not None and isinstance(value.get("format"), int) and isinstance(value.get("stages"), dict)


def _is_own_lock(folder: Path, name: str) -> bool:
    """A lock alone is of a run that was killed before anything else was written."""
    if name not in _BEGUN:
        return False
    value = _json(folder / name)
    return value is not None and set(value) == {"pid", "host", "since", "command"}


def _json(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > 1 << 28:
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _digest(name: str) -> str:
    return hashlib.sha256(f"gradpursuit run {name}".encode()).hexdigest()


def clean(folder: Path) -> None:
    """Put a run in order whose last process was killed: what was set aside, and what was half written."""
    aside.recover(folder)
    places = [
        folder,
        *(folder / name for name in ("data", "trajectory", "selection", "evaluation", "exports", "targets")),
    ]
    places += [path for name in ("selection", "targets") for path in _folders(folder / name)]
    for place in places:
        if place.is_symlink():
            continue
        for old in place.glob(".*.gradpursuit-swap"):
            aside.settled(place / old.name[1 : -len(".gradpursuit-swap")])
        for part in durable.leftovers(place):
            durable.discard(part)


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()] if folder.is_dir() else []
