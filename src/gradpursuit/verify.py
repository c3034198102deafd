"""Whether a run is still what it says: files unchanged, no row missing, features that come out the same again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gradpursuit.errors import GradPursuitError
from gradpursuit.gradient_stage import Split, collector, splits, store_problems, wanted_features
from gradpursuit.gradients.recompute import Difference, recompute, worst
from gradpursuit.pipeline import Run
from gradpursuit.stages import STAGES
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
    """Everything that is wrong, one line each, and the rows that were computed again."""

    problems: list[str]
    checks: list[StoreCheck]


def verify(run: Run, sample: int = 8) -> Verification:
    """Check every sha256 of a run, find missing rows, and compute `sample` rows of every split again, one by one.

    Nothing is written. Stores in which something is missing or changed are not computed again.

    Raises:
        GradPursuitError: the model or the trajectory cannot be read.
    """
    problems = list(_stage_problems(run))
    sound = []
    for split in _splits(run):
        found = store_problems(run, split)
        problems += found
        if split.kinds and not found:
            sound.append(split)
    checks = [] if not sound else _recompute(run, sound, sample)
    allowed = ROUNDED if run.compute.autocast else EXACT
    for check in checks:
        if not check.worst.lost <= allowed + STORED[check.dtype]:
            problems.append(
                f"{check.store}: the feature of '{check.worst.id}' at checkpoint {check.worst.checkpoint} comes out "
                f"differently: 1 - cos = {check.worst.lost:.1e}, allowed {allowed + STORED[check.dtype]:.1e}; "
                "collect the gradients again"
            )
    return Verification(problems, checks)


def _stage_problems(run: Run) -> Iterator[str]:
    """Stages that are not complete for the run as it is configured, and files of theirs that changed."""
    fingerprint = ""
    for stage in STAGES:
        fingerprint = run.fingerprint_of(stage, fingerprint)
        state = run.manifest.state(stage.name, fingerprint)
        if state == "damaged":
            for name in run.manifest.changed(stage.name):
                path, again = run.folder / name, f"gradpursuit {stage.verb} {run.folder}"
                yield f"{path}: missing, or not what '{stage.name}' wrote; run `{again}`"
        elif state != "complete":
            yield f"{run.folder}: stage '{stage.name}' is {state}; run `gradpursuit {stage.verb} {run.folder}`"


def _splits(run: Run) -> Iterator[Split]:
    """The run's own target and pool, as far as their rows can be read, and the targets that were added."""
    from gradpursuit.data import Table

    if not run.manifest.has_finished("data") or not run.manifest.has_finished("trajectory"):
        return
    try:
        yield from splits(run)
    except GradPursuitError:
        return  # told as a changed file of the data stage
    for target in targets(run):
        table = Table.read(target.folder / "data" / "target.parquet")
        folder = target.folder / "gradients" / "target"
        yield Split(f"target '{target.name}'", table, wanted_features(run)["target"], folder)


def _recompute(run: Run, sound: list[Split], sample: int) -> list[StoreCheck]:
    checks = []
    with collector(run) as made:
        for split in sound:
            stores = split.stores(run)
            found = recompute(made, f"the {split.name}", split.table, stores, sample, run.seed("verify"))
            for kind, store in stores.items():
                differences = found[kind.label]
                name = store.folder.relative_to(run.folder).as_posix().replace("gradients/", "")
                checks.append(StoreCheck(name, store.spec.dtype, len(differences), worst(differences)))
    return checks
