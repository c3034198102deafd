"""Whether a run is still what it says: files unchanged, no row missing, features that come out the same again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradpursuit.errors import ConfigError, GradPursuitError, StoreError
from gradpursuit.gradient_stage import (
    Split,
    collector,
    gradient_folder,
    signal_collector,
    splits,
    store_problems,
    target_features,
)
from gradpursuit.gradients.filling import StoreFiller
from gradpursuit.gradients.recompute import Difference, recompute, worst
from gradpursuit.pipeline import Run
from gradpursuit.remote import is_remote
from gradpursuit.stages import STAGES, Stage
from gradpursuit.targets import targets

EXACT, ROUNDED = (
    1e-4,
    2e-2,
)  # allowed 1 - cos: in float32, and with bfloat16 products, whose rounding meets other batches
STORED = {"float32": 0.0, "float16": 1e-6, "bfloat16": 1e-5, "int8": 1e-3}  # and what the type on disk adds


@dataclass(frozen=True)
class StoreCheck:
    """One store: how many rows were computed again, and the one that differs most from what is stored."""

    store: str
    dtype: str
    rows: int
    worst: Difference


@dataclass(frozen=True)
class Verification:
    """Everything that is wrong, one line each, and the rows that were computed again.

    `outdated` is what was made with other settings or inputs, or of what is outdated itself: nothing is wrong with it,
    but it does not belong to the run as it is configured.
    """

    problems: list[str]
    checks: list[StoreCheck]
    outdated: list[str]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; `lost` is null where a row could not be computed again."""
        value = asdict(self)
        for check in value["checks"]:
            if math.isnan(check["worst"]["lost"]):
                check["worst"]["lost"] = None
        return value


def verify(run: Run, sample: int = 8) -> Verification:
    """Check every sha256 of a run, find missing rows, and compute `sample` rows of every split again, one by one.

    Nothing is written. What is damaged is not computed again, nor is anything when data or trajectory are. Of what is
    outdated nothing is checked.

    Raises:
        ConfigError: `sample` is negative.
        GradPursuitError: the model cannot be read.
    """
    if sample < 0:
        raise ConfigError(f"--sample {sample}: the number of rows to compute again cannot be negative")
    found = {stage.name: _look_at(run, stage) for stage in STAGES}
    problems = [problem for lines, _ in found.values() for problem in lines]
    outdated = [line for _, lines in found.values() for line in lines]
    sound: list[Split] = []
    if not any((*found["data"], *found["trajectory"], found["gradients"][1])):
        for split, again in _splits(run, problems, outdated):
            damaged = store_problems(run, split)
            problems += [f"{problem}; run `{again}`" for problem in damaged]
            if split.kinds and not damaged:
                sound.append(split)
    checks = _recompute(run, sound, sample, problems) if sound and sample else []
    allowed = ROUNDED if run.compute.autocast else EXACT
    for check in checks:
        if not check.worst.lost <= allowed + STORED[check.dtype]:
            problems.append(
                f"{check.store}: the feature of '{check.worst.id}' at checkpoint {check.worst.checkpoint} comes out "
                f"differently: 1 - cos = {check.worst.lost:.1e}, allowed {allowed + STORED[check.dtype]:.1e}; "
                "collect the gradients again"
            )
    return Verification(list(dict.fromkeys(problems)), checks, outdated)


def _look_at(run: Run, stage: Stage) -> tuple[list[str], list[str]]:
    """What is wrong with a stage or its files, and whether it is outdated; neither if it is complete and whole."""
    try:
        state = run.manifest.state(stage.name, run.fingerprint(stage.name))
    except GradPursuitError as error:
        return [str(error)], []
    again = f"run `gradpursuit {stage.verb} {run.folder}`"
    if state == "damaged":
        changed = [run.folder / name for name in run.manifest.changed(stage.name)]
        return [f"{path}: missing, or not what '{stage.name}' wrote; {again}" for path in changed], []
    if state == "complete":
        return [], []
    told = [f"{run.folder}: stage '{stage.name}' is {state}; {again}"]
    return ([], told) if state == "outdated" else (told, [])


def _splits(run: Run, problems: list[str], outdated: list[str]) -> Iterator[tuple[Split, str]]:
    """The run's own target and pool, and the targets that were added, each with the command that mends it.

    What is wrong with added targets goes to `problems`, or to `outdated`.
    """
    from gradpursuit.data import Table

    yield from ((split, shlex.join(["gradpursuit", "collect", str(run.folder)])) for split in splits(run))
    for target in targets(run):
        try:
            if trouble := target.trouble():
                (outdated if target.state() == "outdated" else problems).append(f"target '{target.name}' {trouble}")
                continue
            table = Table.read(target.folder / "data" / "target.parquet")
        except GradPursuitError as error:
            problems.append(str(error))
            continue
        folder = gradient_folder(run, target.name) / "target"
        yield Split(f"target '{target.name}'", table, target_features(run), folder), target.command()


def _recompute(run: Run, sound: list[Split], sample: int, problems: list[str]) -> list[StoreCheck]:
    """Of all splits first the gradients, then each signal, whose model is another one."""
    checks: list[StoreCheck] = []

    def again(made: StoreFiller[Any], split: Split, kinds: Sequence[Any]) -> None:
        stores = {kind: store for kind, store in split.stores(run).items() if kind in kinds}
        try:
            found = recompute(made, f"the {split.name}", split.table, stores, sample, run.seed("verify"))
        except StoreError as error:
            problems.append(str(error))
            return
        for kind, store in stores.items():
            differences = found[kind.label]
            checks.append(StoreCheck(_name(run, store.folder), store.spec.dtype, len(differences), worst(differences)))

    if any(split.gradients for split in sound):
        with collector(run) as made:
            for split in sound:
                if split.gradients:
                    again(made, split, split.gradients)
    if any(split.signals for split in sound):
        with signal_collector(run) as forward:
            for split in sound:
                for signal in split.signals:
                    again(forward, split, [signal])
    return checks


def _name(run: Run, folder: Path) -> str:
    """Of a store: its path in the run folder, or where else it lies."""
    if is_remote(folder) or not folder.is_relative_to(run.folder):
        return str(folder)
    return folder.relative_to(run.folder).as_posix().replace("gradients/", "")
