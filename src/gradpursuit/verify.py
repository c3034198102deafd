"""Whether a run is still what it says: files unchanged, no row missing, features that come out the same again."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gradpursuit.errors import ConfigError, DamagedError, GradPursuitError, StoreError, TrajectoryError
from gradpursuit.file_check import check_files
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
from gradpursuit.integrity import damaged_inputs, input_message
from gradpursuit.opening import read_config
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
    but it does not belong to the run as it is configured. `unexpected` are files that the run did not write.
    """

    problems: list[str]
    checks: list[StoreCheck]
    outdated: list[str]
    unexpected: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; `lost` is null where a row could not be computed again."""
        value = asdict(self)
        for check in value["checks"]:
            if math.isnan(check["worst"]["lost"]):
                check["worst"]["lost"] = None
        return value


def verify_folder(folder: Path, sample: int = 8, overrides: Sequence[str] = ()) -> Verification:
    """:func:`verify` of the run in a folder, whatever is damaged there: files are checked without its settings.

    Raises:
        ConfigError: `sample` is negative.
        GradPursuitError: the model cannot be read.
    """
    _refuse_negative(sample)
    folder = folder.expanduser().resolve()
    try:
        run = Run(read_config(folder / "config.yaml", list(overrides), str(folder)))
    except GradPursuitError as error:
        found = check_files(folder)
        known = any(line.startswith((f"{folder / 'config.yaml'}: ", str(error))) for line in found.problems)
        problems = found.problems if known else [*found.problems, str(error)]
        return Verification(_once(problems), [], [], found.unexpected)
    return verify(run, sample)


def verify(run: Run, sample: int = 8) -> Verification:
    """Check every file that a run wrote, find missing rows, and compute `sample` rows of every split again, one by one.

    Nothing is written. What is damaged is not computed again, nor is anything when data or trajectory are.

    Raises:
        ConfigError: `sample` is negative.
        GradPursuitError: the model cannot be read.
    """
    _refuse_negative(sample)
    problems, outdated, sound, checked = list[str](), list[str](), list[Split](), set[Path]()
    try:
        if changed := damaged_inputs(run, missing=True):
            problems.append(input_message(run, changed))
        stages = {stage.name: _look_at(run, stage) for stage in STAGES}
        whole = not any(run.manifest.changed(name) for name in ("data", "trajectory"))
    except DamagedError as error:  # the manifest: what the run holds is not known
        files = check_files(run.folder)
        return Verification(_once([*files.problems, str(error)]), [], [], files.unexpected)
    unfinished = [line for lines, _ in stages.values() for line in lines]
    problems += unfinished[:1]  # those after it cannot be complete either
    outdated += [line for _, lines in stages.values() for line in lines]
    if whole and not any((*stages["data"], *stages["trajectory"], stages["gradients"][1])):
        for split, again in _splits(run, problems, outdated):
            damaged = store_problems(run, split)
            checked |= {split.folder / kind.label for kind in split.kinds}
            problems += [f"{problem}; run `{again}`" for problem in damaged]
            if split.kinds and not damaged:
                sound.append(split)
    files = check_files(run.folder, checked)
    problems += files.problems
    if not whole and run.manifest.entry("gradients"):
        problems.append(
            f"{run.folder}: rows of the gradients were not looked for or computed again, as data or trajectory are "
            f"damaged; when that is repaired, run `{shlex.join(['gradpursuit', 'verify', str(run.folder)])}` again"
        )
    try:
        checks = _recompute(run, sound, sample, problems) if sound and sample else []
    except TrajectoryError as error:
        problems, checks = [*problems, str(error)], []
    allowed = ROUNDED if run.compute.autocast else EXACT
    for check in checks:
        if not check.worst.lost <= allowed + STORED[check.dtype]:
            problems.append(
                f"{check.store}: the feature of '{check.worst.id}' at checkpoint {check.worst.checkpoint} comes out "
                f"differently: 1 - cos = {check.worst.lost:.1e}, allowed {allowed + STORED[check.dtype]:.1e}; "
                "collect the gradients again"
            )
    return Verification(_once(problems), checks, outdated, files.unexpected)


def _refuse_negative(sample: int) -> None:
    if sample < 0:
        raise ConfigError(f"--sample {sample}: the number of rows to compute again cannot be negative")


def _once(problems: Sequence[str]) -> list[str]:
    """Each problem once; a manifest that is damaged is named once."""
    found: dict[str, str] = {}
    for problem in problems:
        place = problem.partition(": ")[0]
        found.setdefault(place if place.endswith("manifest.json") else problem, problem)
    return list(found.values())


def _look_at(run: Run, stage: Stage) -> tuple[list[str], list[str]]:
    """Whether a stage is not finished, or outdated; neither if it is complete. Its files were checked before."""
    try:
        state = run.manifest.state(stage.name, run.fingerprint(stage.name), quick=True)
    except DamagedError:
        raise
    except GradPursuitError as error:
        return [str(error)], []
    if state in ("complete", "damaged"):
        return [], []
    told = [f"{run.folder}: stage '{stage.name}' is {state}; run `gradpursuit {stage.verb} {run.folder}`"]
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
                if target.state() == "damaged":
                    continue  # its files were named before
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
