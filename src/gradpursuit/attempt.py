"""One attempt at a stage: what it replaces is set aside, and the manifest says what it is and how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpursuit.aside import is_waiting, replacing
from gradpursuit.durable import discard, sync_tree
from gradpursuit.errors import GradPursuitError, ModelError, RunError, is_out_of_memory
from gradpursuit.files import write_text
from gradpursuit.integrity import kept_damage, stage_damage, told
from gradpursuit.manifest import State
from gradpursuit.sealed import sealed_text

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run
    from gradpursuit.stages import Stage

logger = logging.getLogger("gradpursuit")


def run_stage(run: Run, stage: Stage, fingerprint: str, state: State) -> None:
    """Do the work of a stage; finished work that it replaces comes back if it fails or is killed.

    Raises:
        GradPursuitError: whatever the stage refuses.
    """
    if stage.check:
        stage.check(run)
    if state == "damaged" or (state == "outdated" and stage.name != "report"):  # each report is of its moment
        reason = (
            "settings or inputs have changed"
            if state == "outdated"
            else told(stage_damage(run, stage.name), stage.name)
        )
        if state == "damaged" and not stage_damage(run, stage.name):
            reason = "a file of it is missing or has changed"  # its check has named each
        mend = "what still fits is kept" if stage.keep == "always" else "it is made again"
        logger.warning("%s: %s, %s", stage.name, reason, mend)
    anew = stage.keep == "never" or (stage.keep == "unfinished" and state != "unfinished")
    config, manifest = run.folder / "config.yaml", run.folder / "manifest.json"
    emptied = run.paths(stage.owns) if anew else []
    if not run.manifest.has_finished(stage.name):
        # Nothing finished is replaced: what is done now shows how far it got. A refusal leaves the old settings.
        before = config.read_text(encoding="utf-8") if config.is_file() else None
        for place in emptied:
            discard(place)
        try:
            _fill(run, stage, fingerprint, emptied)
        except GradPursuitError as error:
            if not isinstance(error, RunError) and before is not None:
                write_text(config, before)
                if manifest.is_file():
                    run.manifest.record_config(before)
            raise
        return
    known = [name for entry in run.manifest.read()["stages"].values() for name in entry.get("outputs", {})]
    known += [path.relative_to(run.folder).as_posix() for path in _made(run, stage)]  # shards are no outputs
    with replacing(run.folder, stage.name, [config, manifest], keep_unfinished=stage.keep == "always") as old:
        for place in emptied or ([] if stage.intact else run.paths(stage.owns)):
            old.set_aside(place, copy=not anew)
        for place in run.paths(stage.writes):
            old.set_aside(place, copy=True)
        _fill(run, stage, fingerprint, emptied)
        old.commit(known)


def _fill(run: Run, stage: Stage, fingerprint: str, emptied: Sequence[Path]) -> None:
    for path in kept_damage(run, stage):  # what is kept is recorded as right again
        if path.is_dir() or path.parent.resolve() != run.folder.resolve() / path.parent.relative_to(run.folder):
            raise RunError(f"{path}: a folder has the name of this file, or a link leads there: move it away")
        discard(path)
    config = sealed_text(run.config.dump())
    write_text(run.folder / "config.yaml", config)
    plan = stage.plan(run) if stage.plan else None
    run.manifest.begin(stage.name, fingerprint, run.config.seed, plan, emptied, config)
    start = time.monotonic()
    detail = _work(run, stage)
    outputs = _outputs(run, stage)
    for folder in run.paths(stage.owns):
        if folder.is_dir():
            sync_tree(folder)
    run.manifest.complete(stage.name, time.monotonic() - start, detail, outputs)


def _outputs(run: Run, stage: Stage) -> list[Path]:
    """The files of a finished stage that are known by their sha256: all of its own, but shards, which know it."""
    found = [path for path in _made(run, stage) if not stage.intact or path.suffix != ".safetensors"]
    return sorted({path for path in [*found, *run.paths(stage.writes)] if path.is_file()})


def _made(run: Run, stage: Stage) -> list[Path]:
    found = [path for folder in run.paths(stage.owns) for name in stage.made for path in folder.glob(name)]
    return [path for path in found if not is_waiting(path.relative_to(run.folder))]


def _work(run: Run, stage: Stage) -> dict[str, Any]:
    try:
        return stage.work(run)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{stage.name}: out of memory on {run.compute.device}; lower gradients.tokens_per_batch, "
            "warmup.batch_size, evaluation.batch_size or data.max_tokens, and run again: finished work is kept"
        ) from error
