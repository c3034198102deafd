"""The manifest of a run: versions, machine, seed, and the state, time and findings of every stage."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from gradpursuit import __version__
from gradpursuit.errors import RunError
from gradpursuit.files import read_json, sha256_of, write_json

FORMAT = 1
SELECTION_FORMAT = 3  # of a selection's files and of the strategies' defaults; those in another format are made again
State = Literal["new", "unfinished", "outdated", "damaged", "complete"]
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "scipy", "scikit-learn", "safetensors")


class Manifest:
    """`manifest.json` of a run folder; every change is written at once, atomically."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "manifest.json"

    def read(self) -> dict[str, Any]:
        """Its content; that of a run not yet begun if there is no file.

        Raises:
            RunError: the file is broken or of another format.
        """
        if not self._path.is_file():
            return {"format": FORMAT, "created": _now(), "stages": {}}
        value = read_json(self._path)
        stages = value.get("stages") if isinstance(value, dict) and value.get("format") == FORMAT else None
        if not isinstance(stages, dict) or not all(isinstance(entry, dict) for entry in stages.values()):
            raise RunError(f"{self._path}: not a run manifest of format {FORMAT}; choose another run folder")
        return value

    def entry(self, stage: str) -> dict[str, Any]:
        """What is recorded of `stage`; empty if it was never begun."""
        found: dict[str, Any] = self.read()["stages"].get(stage, {})
        return found

    def state(self, stage: str, fingerprint: str, *, quick: bool = False) -> State:
        """How far `stage` got with these inputs and settings, and whether its outputs are still what it wrote.

        With `quick`, outputs are known by their size, not by their sha256.
        """
        entry = self.entry(stage)
        if not entry:
            return "new"
        if entry.get("fingerprint") != fingerprint:
            return "outdated" if entry.get("state") == "complete" else "new"
        if entry.get("state") != "complete":
            return "unfinished"
        return "damaged" if self.changed(stage, quick=quick) else "complete"

    def changed(self, stage: str, *, quick: bool = False) -> list[str]:
        """Outputs of `stage` that are missing, or are not what it wrote; `quick` as in :meth:`state`."""
        known, is_same = ("sizes", _has_size) if quick else ("outputs", _has_sha256)
        outputs = self.entry(stage).get(known, {})
        return [name for name, value in outputs.items() if not is_same(self._path.parent / name, value)]

    def has_finished(self, stage: str) -> bool:
        """Whether `stage` was ever finished here, with whatever settings."""
        return bool(self.entry(stage).get("state") == "complete")

    def fingerprint(self, stage: str) -> str:
        """The fingerprint that `stage` was run with."""
        return str(self.read()["stages"][stage]["fingerprint"])

    def finished(self) -> dict[str, str]:
        """The fingerprint that every finished stage was run with."""
        found = self.read()["stages"].items()
        return {name: entry.get("fingerprint", "") for name, entry in found if entry.get("state") == "complete"}

    def begin(
        self,
        stage: str,
        fingerprint: str,
        seed: int,
        plan: dict[str, Any] | None = None,
        emptied: Sequence[Path] = (),
    ) -> None:
        """Record that `stage` runs now, here, with these versions, and what it is going to write.

        Other stages that had files in the `emptied` folders are outdated from now on.
        """
        value = self.read()
        value.update(gradpursuit=__version__, seed=seed, packages=_versions(), machine=_machine())
        value["stages"][stage] = {"state": "running", "fingerprint": fingerprint, "started": _now(), "plan": plan or {}}
        lost = tuple(f"{folder.relative_to(self._path.parent).as_posix()}/" for folder in emptied)
        for entry in value["stages"].values():
            if any(name.startswith(lost) for name in entry.get("outputs", {})):
                entry.update(fingerprint="", outputs={}, sizes={})
        write_json(self._path, value)

    def complete(self, stage: str, seconds: float, detail: dict[str, Any], outputs: Sequence[Path]) -> None:
        """Record that `stage` is finished, how long it took, what it found, and sha256 and size of its `outputs`."""
        files = {path.relative_to(self._path.parent).as_posix(): path for path in outputs}
        value = self.read()
        value["stages"][stage].update(
            state="complete",
            seconds=round(seconds, 2),
            detail=detail,
            outputs={name: sha256_of(path) for name, path in files.items()},
            sizes={name: path.stat().st_size for name, path in files.items()},
        )
        write_json(self._path, value)


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON value, for fingerprints."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _has_sha256(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    return {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}
