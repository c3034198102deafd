"""The manifest of a run: versions, machine, seed, and the state, time and findings of every stage."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from gradpursuit import __version__
from gradpursuit.errors import DamagedError, RunError
from gradpursuit.files import sha256_of
from gradpursuit.sealed import SEAL, digest_now, parse, unsealed, write_sealed

FORMAT = 2  # 1 had no checksum of itself
SELECTION_FORMAT = 4  # of a selection's files and of the strategies' defaults; those in another format are made again
State = Literal["new", "unfinished", "outdated", "damaged", "complete"]
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "scipy", "scikit-learn", "safetensors")


class Manifest:
    """`manifest.json` of a run folder; every change is written at once, atomically, with a checksum of the whole.

    Args:
        folder: of the run, or of a target added to it.
        again: the command that makes it again when it is damaged; empty: that of a run.
    """

    def __init__(self, folder: Path, again: str = "") -> None:
        self.path = folder / "manifest.json"
        other = folder.with_name(f"{folder.name}-again")
        run = shlex.join(["gradpursuit", "run", str(folder / "config.yaml"), "--run-dir", str(other)])
        self._fix = "nothing that it says of the files can be relied on. Put it back from a copy; without one, " + (
            f"run `{again}`" if again else f"`{run}` makes the run again in another folder"
        )

    def read(self) -> dict[str, Any]:
        """Its content; that of a run not yet begun if there is no file.

        Raises:
            DamagedError: any byte of it is not what was written.
            RunError: it is of another format.
        """
        if not os.path.lexists(self.path):
            return {"format": FORMAT, "created": _now(), "stages": {}}
        try:
            content, text = parse(self.path)
            _refuse_old(self.path, content)
            value = unsealed(self.path, content, text)
        except DamagedError as error:
            raise DamagedError(self.path, error.reason, self._fix) from None
        if value.get("format") != FORMAT or not isinstance(value.get("stages"), dict):
            raise RunError(
                f"{self.path}: of format {value.get('format')!r}, of a later gradpursuit; this one reads format "
                f"{FORMAT}. Install that version, or choose another run folder (--run-dir)"
            )
        if outside := [name for name in _named(value) if Path(name).is_absolute() or ".." in Path(name).parts]:
            raise DamagedError(self.path, f"it names '{outside[0]}', which lies outside of its folder", self._fix)
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
        return [name for name, value in outputs.items() if not is_same(self.path.parent / name, value)]

    def outputs(self) -> dict[str, str]:
        """The stage that wrote each file of the finished stages, by its path in the folder."""
        return {
            name: stage
            for stage, entry in self.read()["stages"].items()
            if entry.get("state") == "complete"
            for name in entry.get("outputs", {})
        }

    def config_digest(self) -> str | None:
        """sha256 of the `config.yaml` that the last stage ran with; None: not known."""
        found: str | None = self.read().get("config")
        return found

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
        config: str | None = None,
    ) -> None:
        """Record that `stage` runs now, here, with these versions and settings, and what it is going to write.

        Other stages that had files in the `emptied` folders are outdated from now on.
        """
        value = self.read()
        value.update(gradpursuit=__version__, seed=seed, packages=_versions(), machine=_machine())
        value["stages"][stage] = {"state": "running", "fingerprint": fingerprint, "started": _now(), "plan": plan or {}}
        if config is not None:
            value["config"] = hashlib.sha256(config.encode()).hexdigest()
        lost = tuple(f"{folder.relative_to(self.path.parent).as_posix()}/" for folder in emptied)
        for entry in value["stages"].values():
            if any(name.startswith(lost) for name in entry.get("outputs", {})):
                entry.update(fingerprint="", outputs={}, sizes={})
        write_sealed(self.path, value)

    def complete(self, stage: str, seconds: float, detail: dict[str, Any], outputs: Sequence[Path]) -> None:
        """Record that `stage` is finished, how long it took, what it found, and sha256 and size of its `outputs`."""
        files = {path.relative_to(self.path.parent).as_posix(): path for path in outputs}
        value = self.read()
        value["stages"][stage].update(
            state="complete",
            seconds=round(seconds, 2),
            detail=detail,
            outputs={name: sha256_of(path) for name, path in files.items()},
            sizes={name: path.stat().st_size for name, path in files.items()},
        )
        write_sealed(self.path, value)

    def record_config(self, text: str) -> None:
        """Record that `config.yaml` was written again, outside of a stage."""
        write_sealed(self.path, {**self.read(), "config": hashlib.sha256(text.encode()).hexdigest()})


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON value, for fingerprints."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _named(value: dict[str, Any]) -> Iterator[str]:
    """The files that the stages wrote; whoever reads the manifest opens them, and may replace them."""
    for entry in value["stages"].values():
        yield from (*entry.get("outputs", ()), *entry.get("sizes", ()))


def _refuse_old(path: Path, value: Any) -> None:
    number = value.get("format") if isinstance(value, dict) and SEAL not in value else None
    if type(number) is int and 1 <= number < FORMAT:
        raise RunError(
            f"{path}: of format {number}, of an earlier gradpursuit, which kept no checksum of it; this one reads "
            f"format {FORMAT}. Finish the run with that version, or run it again in another folder (--run-dir)"
        )


def _has_sha256(path: Path, digest: str) -> bool:
    return digest_now(path) == digest


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
