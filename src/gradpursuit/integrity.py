"""Which files of a run are no longer what it wrote: for stages and reports, which must not use such a file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradpursuit.errors import RunError
from gradpursuit.sealed import digest_now, harm

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run
    from gradpursuit.stages import Stage

_NAMED = 5  # files that one message names
_CHECKED_BY_LINE = "results.jsonl"


def told(paths: Sequence[Path], stage: str) -> str:
    """The files of a stage that are damaged, as one sentence."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(harm(path, f"'{stage}' wrote"), []).append(path)
    return "; ".join(f"{_listed(some)}: {wrong}" for wrong, some in found.items())


def _listed(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _NAMED} more files" if len(paths) > _NAMED else ""
    return f"{', '.join(map(str, paths[:_NAMED]))}{more}"


def stage_damage(run: Run, stage: str) -> list[Path]:
    """Files of a finished stage that are missing or changed, whatever settings it was run with."""
    if not run.manifest.has_finished(stage):
        return []
    return [run.folder / name for name in run.manifest.changed(stage)]


def kept_damage(run: Run, stage: Stage) -> list[Path]:
    """Changed files of a stage that goes on with what is there; those of the comparison's results check each line."""
    if stage.keep != "always":
        return []
    return [path for path in stage_damage(run, stage.name) if path.name != _CHECKED_BY_LINE]


def damaged_inputs(run: Run, *, missing: bool = False) -> list[Path]:
    """Files that the quickstart made in the run folder, and that are not what the data were cleaned from.

    Stages go on without a file that is gone; `missing` names it too.
    """
    recorded = run.manifest.entry("data").get("detail", {}).get("inputs", {})
    known = {Path(path): digest for hashes in recorded.values() for path, digest in hashes.items()}
    own = {path: digest for path, digest in known.items() if path.is_relative_to(run.folder / "input")}
    return [path for path, digest in own.items() if (missing or os.path.lexists(path)) and digest_now(path) != digest]


def refuse_damaged_inputs(run: Run) -> None:
    """See that the quickstart's own inputs are what they were.

    Raises:
        RunError: one is not.
    """
    if changed := damaged_inputs(run):
        raise RunError(input_message(run, changed))


def input_message(run: Run, changed: Sequence[Path]) -> str:
    """What is said of changed inputs."""
    again = shlex.join(["gradpursuit", "quickstart", "--run-dir", str(run.folder)])
    names = ", ".join(map(str, changed))
    return f"{names}: missing, or not what the data were cleaned from; move it away and run `{again}`"


def refuse_damage(run: Run) -> None:
    """See that no file is changed that a report could read; what is missing is said in the report itself.

    The shards of the gradients are checked when they are read.

    Raises:
        RunError: one is; the command that makes it again is named.
    """
    from gradpursuit.stages import STAGES

    refuse_damaged_inputs(run)
    for stage in STAGES[:-1]:
        if changed := [path for path in stage_damage(run, stage.name) if os.path.lexists(path)]:
            again = shlex.join(["gradpursuit", stage.verb, str(run.folder)])
            raise RunError(f"{told(changed, stage.name)}; a report would not be right: run `{again}` first")
    if run.target:
        own, manifest = run.target.folder, run.target.manifest
        changed = [own / name for stage in ("data", "gradients") for name in manifest.changed(stage)]
        if changed := [path for path in changed if os.path.lexists(path)]:
            raise RunError(
                f"{told(changed, f'target {run.target.name}')}; a report would not be right: run "
                f"`{run.target.command()}` first"
            )
