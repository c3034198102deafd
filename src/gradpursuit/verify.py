"""Whether a run is still what it says: files unchanged, no row missing, features that come out the same again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gradpursuit.errors import ConfigError, GradPursuitError, StoreError
from gradpursuit.gradient_stage import Split, collector, gradient_folder, splits, store_problems, wanted_features
from gradpursuit.gradients.recompute import Difference, recompute, worst
from gradpursuit.pipeline import Run
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
    """Everything that is wrong, one line each, and the rows that were computed again."""

    problems: list[str]
    checks: list[StoreCheck]


def verify(run: Run, sample: int = 8) -> Verification:
    """Check every sha256 of a run, find missing rows, and compute `sample` rows of every split again, one by one.

    Nothing is written. What is damaged is not computed again, nor is anything when data or trajectory are.

    Raises:
        ConfigError: `sample` is negative.
        GradPursuitError: the model cannot be read.
    """
    if sample < 0:
        raise ConfigError(f"--sample {sample}: the number of rows to compute again cannot be negative")
    found = {stage.name: list(_stage_problems(run, stage)) for stage in STAGES}
    problems = [problem for lines in found.values() for problem in lines]
    sound: list[Split] = []
    if not found["data"] and not found["trajectory"]:
        for split in _splits(run, problems):
            damaged = store_problems(run, split)
            problems += damaged
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
    return Verification(problems, checks)


def _stage_problems(run: Run, stage: Stage) -> Iterator[str]:
    """Whether a stage is complete for the run as it is configured, and files of it that changed."""
    try:
        state = run.manifest.state(stage.name, run.fingerprint(stage.name))
    except GradPursuitError as error:
        yield str(error)
        return
    if state == "damaged":
        for name in run.manifest.changed(stage.name):
            path, again = run.folder / name, f"gradpursuit {stage.verb} {run.folder}"
            yield f"{path}: missing, or not what '{stage.name}' wrote; run `{again}`"
    elif state != "complete":
        yield f"{run.folder}: stage '{stage.name}' is {state}; run `gradpursuit {stage.verb} {run.folder}`"


def _splits(run: Run, problems: list[str]) -> Iterator[Split]:
    """The run's own target and pool, and the targets that were added; what is wrong with those goes to `problems`."""
    from gradpursuit.data import Table

    yield from splits(run)
    for target in targets(run):
        try:
            state = target.state()
            changed = [
                target.folder / name for stage in ("data", "gradients") for name in target.manifest.changed(stage)
            ]
            if state != "complete":
                named = ", ".join(map(str, changed)) or "its stages"
                problems.append(f"target '{target.name}' is {state} ({named}); run `{target.command()}`")
                continue
            table = Table.read(target.folder / "data" / "target.parquet")
        except GradPursuitError as error:
            problems.append(str(error))
            continue
        folder = gradient_folder(run, target.name) / "target"
        yield Split(f"target '{target.name}'", table, wanted_features(run)["target"], folder)


def _recompute(run: Run, sound: list[Split], sample: int, problems: list[str]) -> list[StoreCheck]:
    checks = []
    with collector(run) as made:
        for split in sound:
            stores = split.stores(run)
            try:
                found = recompute(made, f"the {split.name}", split.table, stores, sample, run.seed("verify"))
            except StoreError as error:
                problems.append(str(error))
                continue
            for kind, store in stores.items():
                differences = found[kind.label]
                inside = store.folder.is_relative_to(run.folder)
                name = store.folder.relative_to(run.folder).as_posix().replace("gradients/", "") if inside else ""
                checks.append(
                    StoreCheck(name or str(store.folder), store.spec.dtype, len(differences), worst(differences))
                )
    return checks
