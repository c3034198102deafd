"""Every file of a run folder, checked without its settings: changed, missing, and not written by the run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradpursuit import aside, live, lock, marker
from gradpursuit.errors import DamagedError, GradPursuitError, StoreError
from gradpursuit.evaluation.journal import Journal
from gradpursuit.export_stage import EXPORT_RECORD, export_damage
from gradpursuit.manifest import Manifest
from gradpursuit.sealed import digest_now, harm, is_sealed_text
from gradpursuit.stages import STAGES
from gradpursuit.store import GradientStore

_NAMED = 5  # damaged shards of one store that are named
_UNCHECKED = ("log.txt", lock.NAME, live.NAME)  # added to, or emptied, at any time
_INTERRUPTED = (aside.OPEN, aside.DONE)


@dataclass
class FileCheck:
    """What was found.

    Attributes:
        problems: one line for each file that is missing or changed, with the command that makes it again.
        unexpected: files that the run did not write; they are the user's, and no damage.
        known: files that the run wrote.
    """

    problems: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    known: set[Path] = field(default_factory=set)


def check_files(folder: Path, checked: Collection[Path] = ()) -> FileCheck:
    """Check every file of a run folder but `log.txt`; `checked` are stores that need not be read again."""
    found = FileCheck()
    stages = _recorded(folder, found)
    _check_own(folder, stages, found)
    _check_stage_files(folder, stages, found)
    _check_exports(folder, found)
    _check_targets(folder, found)
    _check_stores(folder / "gradients", found, checked, f"gradpursuit collect {shlex.quote(str(folder))}")
    if stages is not None:
        found.unexpected = [str(path) for path in _others(folder, stages, found.known)]
    return found


def _recorded(folder: Path, found: FileCheck) -> dict[str, Any] | None:
    """What the manifest says of each stage; None if it is damaged."""
    manifest = Manifest(folder)
    found.known.add(manifest.path)
    try:
        if not os.path.lexists(manifest.path):
            raise DamagedError(manifest.path, "it is missing")
        stages: dict[str, Any] = manifest.read()["stages"]
    except GradPursuitError as error:
        found.problems.append(f"{error}. What it knew of the files of the stages could not be checked")
        return None
    return stages


def _check_own(folder: Path, stages: dict[str, Any] | None, found: FileCheck) -> None:
    """The configuration, and what makes the folder a run."""
    config, name = folder / "config.yaml", folder / marker.NAME
    found.known |= {config, name, *(folder / other for other in (*_UNCHECKED, *_INTERRUPTED))}
    again = shlex.join(["gradpursuit", "run", "YOUR.yaml", "--run-dir", str(folder)])
    if not is_sealed_text(config):
        found.problems.append(
            f"{config}: {harm(config, 'the run wrote')}; put it back from a copy, or move it away and run `{again}` "
            "with the file that the run was begun with"
        )
    elif stages and digest_now(config) != Manifest(folder).config_digest():
        found.problems.append(
            f"{config}: not the settings that the last stage ran with; put it back from a copy, or run "
            f"`{shlex.join(['gradpursuit', 'run', str(config)])}` with these"
        )
    if not marker.is_whole(folder):
        found.problems.append(
            f"{name}: {harm(name, 'the run wrote')}; put it back from a copy, or delete it: the next command "
            "writes another (a store elsewhere that belongs to the run is then refused)"
        )


def _check_stage_files(folder: Path, stages: dict[str, Any] | None, found: FileCheck) -> None:
    verbs = {stage.name: stage.verb for stage in STAGES}
    for stage, entry in (stages or {}).items():
        again = shlex.join(["gradpursuit", verbs.get(stage, "run"), str(folder)])
        for name, digest in entry.get("outputs", {}).items():
            found.known.add(folder / name)
            if digest_now(folder / name) != digest:
                wrong = harm(folder / name, f"'{stage}' wrote")
                found.problems.append(f"{folder / name}: {wrong}; run `{again}`")
    results = folder / "evaluation" / "results.jsonl"
    if results not in found.known and results.is_file():  # of a comparison that is not finished: each line knows
        for line in Journal(results, quiet=True).broken:
            again = shlex.join(["gradpursuit", "compare", str(folder)])
            found.problems.append(f"{results}:{line}: torn or changed; run `{again}`, which computes it again")


def _check_exports(folder: Path, found: FileCheck) -> None:
    for export in sorted(path for path in (folder / "exports").glob("*") if path.is_dir()):
        try:
            changed, flags = export_damage(export)
        except GradPursuitError as error:
            again = shlex.join(["gradpursuit", "export", str(folder)])
            found.problems.append(
                f"{error}, or move {shlex.quote(str(export))} away and export that budget again "
                f"(`{again}` with --k, or what its name says)"
            )
            found.known |= set(export.rglob("*"))
            continue
        found.known |= {export / EXPORT_RECORD, *export.rglob("*")}
        again = shlex.join(["gradpursuit", "export", str(folder), *flags])
        found.problems += [f"{path}: {harm(path, 'was exported')}; run `{again}`" for path in changed]


def _check_targets(folder: Path, found: FileCheck) -> None:
    for path in sorted(path for path in (folder / "targets").glob("*") if path.is_dir()):
        words = ["gradpursuit", "target", "add", str(folder), "--name", path.name]
        manifest = Manifest(path, f"{shlex.join(words)} --file FILE.jsonl --replace")
        found.known.add(manifest.path)
        try:
            if not os.path.lexists(manifest.path):
                if not (path / "data").is_dir() and not (path / "gradients").is_dir():
                    continue  # no target
                raise DamagedError(manifest.path, "it is missing", f"run `{shlex.join(words)} --file FILE.jsonl`")
            stages = manifest.read()["stages"]
        except GradPursuitError as error:
            found.problems.append(str(error))
            found.known |= set(path.rglob("*"))
            continue
        for split, files in stages.get("data", {}).get("detail", {}).get("inputs", {}).items():
            for name in files:
                words += ["--file" if split == "target" else "--heldout", name]
        for stage, entry in stages.items():
            for name, digest in entry.get("outputs", {}).items():
                found.known.add(path / name)
                if digest_now(path / name) != digest:
                    wrong = harm(path / name, f"'{stage}' of target '{path.name}' wrote")
                    found.problems.append(f"{path / name}: {wrong}; run `{shlex.join(words)}`")


def _check_stores(folder: Path, found: FileCheck, checked: Collection[Path], again: str) -> None:
    """Shards by the checksums in them; the manifests of stores by their fingerprint."""
    for store in sorted({path.parent.parent for path in folder.glob("*/*/checkpoint-*/*.safetensors")}):
        try:
            opened = GradientStore.open(store)
        except StoreError as error:
            if not any(line.startswith(str(store / "manifest.json")) for line in found.problems):
                found.problems.append(f"{error}; run `{again}`")
            found.known |= set(store.rglob("*"))
            continue
        found.known |= {store / "manifest.json", *map(Path, opened.paths())}
        if store in checked:
            continue
        problems = opened.verify()
        lines = [f"{problem.path}: {problem.reason}; run `{again}`" for problem in problems[:_NAMED]]
        if len(problems) > _NAMED:
            lines.append(f"{store}: and {len(problems) - _NAMED} more shards like these; run `{again}`")
        found.problems += lines


def _others(folder: Path, stages: dict[str, Any], known: set[Path]) -> Iterator[Path]:
    """Files that the run did not write; where a stage is not finished, what it has written is not known yet."""
    owners = {owned.partition("/")[0]: stage.name for stage in STAGES for owned in (*stage.owns, *stage.writes)}
    for path in sorted(folder.rglob("*")):
        part = path.relative_to(folder).parts[0]
        stage = owners.get(part)
        if path.is_dir() and not path.is_symlink():
            continue
        if stage and stages.get(stage, {}).get("state") != "complete":
            continue
        if path not in known and part != "input" and not aside.is_waiting(path.relative_to(folder)):
            yield path
