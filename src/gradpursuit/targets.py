"""Targets added to a run: features of other examples against the trajectory that is kept.

`RUN/targets/NAME/` is made like the run's own: `manifest.json` with the states of its two stages, `data/` with the
cleaned `target.parquet`, `heldout.parquet` and `dropped.jsonl`, `gradients/` with one store per preconditioner. Nothing
else of the run is touched. The pool cannot change any more, so its rows whose content is also in the new target are
left out of every selection for it.
"""

from __future__ import annotations

import dataclasses
import logging
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gradpursuit.aside import is_waiting, replacing
from gradpursuit.config import OWN, SourceSection, target_name
from gradpursuit.durable import discard, sync_tree
from gradpursuit.errors import ConfigError, DamagedError, GradPursuitError, RunError
from gradpursuit.files import read_json
from gradpursuit.gradient_stage import claim_store, gradient_folder, planned_for_target
from gradpursuit.manifest import Manifest, State, digest_of
from gradpursuit.remote import is_remote
from gradpursuit.sources import content_hashes, gone_note

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run

logger = logging.getLogger("gradpursuit")


@dataclass(frozen=True)
class TargetFiles:
    """What a target is made of: JSONL files of its examples, and of those that only score (none: split off).

    `known` is the sha256 of files whose rows are clean already, by split and path: these need not be there any more.
    """

    target: Sequence[str]
    heldout: Sequence[str]
    known: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @cached_property
    def hashes(self) -> dict[str, dict[str, str]]:
        """sha256 of every file, by split and path.

        Raises:
            RunError: a file cannot be read, and it is not known what was in it.
        """
        sources = {name: _sources(getattr(self, name)) for name in ("target", "heldout")}
        found = content_hashes(sources, self.known)
        if note := gone_note(found):
            logger.info("note: %s", note)
        return found


def _sources(paths: Sequence[str]) -> list[SourceSection]:
    return [SourceSection(path=path) for path in paths]


class Target:
    """One added target of a run.

    Raises:
        ConfigError: the name cannot be one.
    """

    def __init__(self, run: Run, name: str) -> None:
        try:
            target_name(name)
        except ValueError as error:
            raise ConfigError(f"target name {name!r}: {error}") from None
        self.name = name
        self.folder = run.folder / "targets" / name
        words = ["gradpursuit", "target", "add", str(run.folder), "--name", name]
        self.manifest = Manifest(self.folder, f"{shlex.join(words)} --file FILE.jsonl --replace")
        self._run = run

    @property
    def inputs(self) -> dict[str, dict[str, str]]:
        """sha256 of the files it was made of, by split and path; empty before its data are clean."""
        found: dict[str, dict[str, str]] = self.manifest.entry("data").get("detail", {}).get("inputs", {})
        return found

    def fingerprints(self, inputs: dict[str, dict[str, str]]) -> dict[str, str]:
        """Of both stages: what they depend on, in the run and in the content of the files.

        Which features there are is no part of it: other strategies may need more of them (:attr:`lacking`).
        """
        run, content = self._run, {name: list(hashes.values()) for name, hashes in inputs.items()}
        data = digest_of({"above": run.fingerprint("data"), "inputs": content})
        settings = run.config.gradients.model_dump(mode="json", exclude={"preconditioner"})
        above = {"above": run.fingerprint("trajectory"), "gradients": settings, "seed": run.config.seed, "data": data}
        return {"data": data, "gradients": digest_of(above)}

    @property
    def features(self) -> list[str]:
        """Labels of the features that it has."""
        found: list[str] = self.manifest.entry("gradients").get("detail", {}).get("features", [])
        return found

    @property
    def lacking(self) -> list[str]:
        """Labels of features that the configured strategies need of a target, and this one has not."""
        entry = self._run.manifest.entry("gradients")
        if entry.get("fingerprint") != self._run.fingerprint("gradients"):
            return []  # the run lacks them itself
        return [label for label in planned_for_target(self._run) if label not in self.features]

    def state(self) -> State:
        """How far it got, for the run as it is configured now."""
        fingerprints = self.fingerprints(self.inputs)
        for stage, fingerprint in fingerprints.items():
            state = self.manifest.state(stage, fingerprint, quick=self._run.quick)
            if state != "complete":
                return "unfinished" if stage == "gradients" and state == "new" else state
        return "unfinished" if self.lacking else "complete"

    def trouble(self) -> str:
        """Why nothing can be chosen for it, and the command that mends it; empty when it is complete."""
        state = self.state()
        if state == "complete":
            return ""
        changed = [self.folder / name for stage in ("data", "gradients") for name in self.manifest.changed(stage)]
        reason = {
            "new": "was not finished",
            "unfinished": "was not finished",
            "outdated": "was made with other settings or another pool",
            "damaged": f"has a file that is missing or was changed: {', '.join(map(str, changed))}",
        }[state]
        if state == "unfinished" and self.features and self.lacking:
            reason = f"lacks features that the strategies need ({', '.join(self.lacking)})"
        return f"{reason}; run `{self.command()}`"

    def fingerprint(self) -> str:
        """What a selection for it depends on.

        Raises:
            RunError: it is not there, or not complete for the run as it is configured now.
        """
        if self.state() == "new":
            names = ", ".join(target.name for target in targets(self._run)) or "none"
            raise RunError(
                f"target '{self.name}': the run has no such target (added: {names}); run `{self.command()}` first, or "
                f"choose for the run's own (selection.target null, or '{OWN}' among evaluation.targets)"
            )
        if trouble := self.trouble():
            raise RunError(f"target '{self.name}' {trouble} first")
        return self.manifest.fingerprint("gradients")

    def command(self) -> str:
        """The command that makes it, or makes it again."""
        words = ["gradpursuit", "target", "add", str(self._run.folder), "--name", self.name]
        for flag, split in (("--file", "target"), ("--heldout", "heldout")):
            for path in self.inputs.get(split, {}):
                words += [flag, path]
        return shlex.join(words) + ("" if self.inputs else " --file FILE.jsonl")

    def is_damaged(self) -> bool:
        """Whether its manifest is damaged."""
        try:
            self.manifest.read()
        except DamagedError:
            return True
        return False

    def describe(self) -> dict[str, Any]:
        """Name, state, rows and files, as JSON values."""
        try:
            detail = self.manifest.entry("data").get("detail", {})
        except RunError:
            return {"name": self.name, "state": "damaged", "rows": {}, "left_out": 0, "features": [], "files": {}}
        try:
            state, lacking = self.state(), self.lacking
        except GradPursuitError:  # an input of the run is gone: what was made of it cannot be compared with it
            state, lacking = "outdated", []
        return {
            "name": self.name,
            "state": state,
            "rows": detail.get("rows", {}),
            "left_out": detail.get("leaks", 0),
            "features": self.features,
            "lacking": lacking,
            "command": self.command(),
            "files": {name: list(hashes) for name, hashes in self.inputs.items()},
        }


def targets(run: Run) -> Iterator[Target]:
    """The targets that were added to a run, by name."""
    for path in sorted((run.folder / "targets").glob("*/manifest.json")):
        try:
            yield Target(run, path.parent.name)
        except ConfigError as error:
            logger.warning("%s: %s; it is passed over", path.parent, error)


def refuse_unknown(run: Run, upto: str) -> None:
    """See that the targets that the stages up to `upto` go by were added, before any work that leads to them.

    Raises:
        RunError: one was not; the commands that add it are named.
    """
    config, wanted = run.config, list[tuple[str, str]]()
    if upto in ("selection", "export", "evaluation", "report") and config.selection.target:
        wanted.append(("selection.target", config.selection.target))
    if upto in ("evaluation", "report"):
        wanted += [("evaluation.targets", name) for name in config.evaluation.targets if name != OWN]
    for key, name in wanted:
        target = Target(run, name)
        if not target.manifest.entry("data") and not run.manifest.has_finished("gradients"):
            collect = shlex.join(["gradpursuit", "collect", *run.words])
            raise RunError(
                f"{key}: '{name}' was not added to this run, and can be when its gradients are collected; run "
                f"`{collect}`, then `{target.command()}`, then this again, or leave '{name}' out"
            )


def add_target(run: Run, name: str, files: TargetFiles, *, replace: bool = False) -> Target:
    """Clean the files of a target and compute its features; finished work with the same content is kept.

    Raises:
        RunError: the run's gradients are not complete, or the name is taken by a target with other content.
        DataError: a file cannot be used, or nothing is left of target or pool; nothing is left behind.
    """
    target = Target(run, name)
    with run.working(f"target {name}"):
        run.require("gradients", f"`target add {name}`")
        damaged = replace and target.is_damaged()
        known = {} if damaged else target.inputs
        files = dataclasses.replace(files, known=known)
        if known and target.fingerprints(known) != target.fingerprints(files.hashes) and not replace:
            raise RunError(
                f"{target.folder}: target '{name}' is there with other content "
                f"({', '.join(path for hashes in known.values() for path in hashes)}); "
                "choose another name, or give --replace"
            )
        claim_store(run)
        if not replace or not target.folder.exists():
            _refuse_foreign(target)
            _make(run, target, files)
            return target
        with replacing(run.folder, f"target {name}", []) as old:
            old.set_aside(target.folder, copy=True)
            if run.config.gradients.store and not is_remote(store := gradient_folder(run, name)):
                old.set_aside(store, copy=True)
            if damaged:
                logger.warning("%s: damaged; the target is made again", target.manifest.path)
                discard(target.manifest.path)
            _make(run, target, files)
            sync_tree(target.folder)
            old.commit(())
    return target


def _refuse_foreign(target: Target) -> None:
    """A folder that has the name of a target, but that no target was written into, is the user's."""
    if target.folder.is_dir() and any(target.folder.iterdir()) and not target.manifest.read()["stages"]:
        raise RunError(
            f"{target.folder}: is there already, and this run did not write it; nothing was changed. Move it "
            "elsewhere, or choose another name"
        )


def _make(run: Run, target: Target, files: TargetFiles) -> None:
    """Both stages, as far as they are not complete."""
    fingerprints = target.fingerprints(files.hashes)
    for stage, work in (("data", _clean), ("gradients", _collect)):
        state = target.manifest.state(stage, fingerprints[stage])
        if state == "complete" and not (stage == "gradients" and target.lacking):
            logger.info("target %s: %s complete, nothing to do", target.name, stage)
            continue
        start = time.monotonic()
        detail = work(run, target, files, fingerprints[stage])
        found = (target.folder / stage).rglob("*")
        outputs = sorted(p for p in found if p.is_file() and not is_waiting(p.relative_to(target.folder)))
        target.manifest.complete(stage, time.monotonic() - start, detail, outputs)


def _clean(run: Run, target: Target, files: TargetFiles, fingerprint: str) -> dict[str, Any]:
    from gradpursuit.data import prepare_target
    from gradpursuit.files import write_folder

    config, renderer = run.config, run.renderer()
    chosen = config.data.model_copy(update={"target": _sources(files.target), "heldout": _sources(files.heldout)})
    new = not target.folder.exists()
    try:
        with write_folder(target.folder / "data") as folder:
            counts = prepare_target(
                chosen, run.table("pool"), renderer, folder, config.evaluation.holdout, run.seed("holdout")
            )
            target.manifest.begin("data", fingerprint, config.seed)
    except BaseException:
        if new:
            discard(target.folder)
        raise
    trained = _trained_on(run, target)
    if trained:
        logger.warning(
            "the warm-up trained on %d pool rows that repeat rows of this target: its gradients are a little smaller",
            trained,
        )
    return {**counts, "inputs": files.hashes}


def _trained_on(run: Run, target: Target) -> int:
    """Rows left out of the pool for this target that the warm-up had trained on."""
    from gradpursuit.data import left_out

    slice_ = run.folder / "trajectory" / "slice.json"
    if not slice_.is_file():  # the trajectory was given: what it was trained on is not known
        return 0
    return len(set(read_json(slice_)["ids"]) & left_out(target.folder / "data"))


def _collect(run: Run, target: Target, files: TargetFiles, fingerprint: str) -> dict[str, Any]:
    from gradpursuit.data import Table
    from gradpursuit.gradient_stage import Split, collect, gradient_folder, target_features

    kinds = target_features(run)
    labels = [kind.label for kind in kinds]
    if target.manifest.state("gradients", fingerprint) == "complete":  # what other strategies needed stays
        labels += [label for label in target.features if label not in labels]
    target.manifest.begin("gradients", fingerprint, run.config.seed, {"target": labels})
    rows = Table.read(target.folder / "data" / "target.parquet")
    collect(run, [Split("target", rows, kinds, gradient_folder(run, target.name) / "target")], target.folder)
    return {"features": labels}
