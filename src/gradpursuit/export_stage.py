"""The export of a run: the files of its selections for trainers, and those of any smaller budget beside them."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpursuit.aside import settled
from gradpursuit.errors import ConfigError, RunError, SelectionError, nearest
from gradpursuit.files import read_json
from gradpursuit.manifest import digest_of
from gradpursuit.sealed import digest_now, read_sealed, write_sealed

if TYPE_CHECKING:
    from gradpursuit.data import Table
    from gradpursuit.pipeline import Run
    from gradpursuit.selection import Selection
    from gradpursuit.selection.budget import Budget, BudgetRequest
    from gradpursuit.selection.card import Origin

logger = logging.getLogger("gradpursuit")
EXPORT_FILES = ("selected.jsonl", "selected.parquet", "repeated.jsonl", "README.md")
EXPORT_FOLDER = "dataset"
_SAVED = re.compile(r"data-\d+-of-\d+\.arrow|dataset_info\.json|state\.json")  # what `save_to_disk` writes
EXPORT_RECORD = "export.json"
_WHOLE = "the whole selection"


def export(run: Run) -> dict[str, Any]:
    """The stage: the files of every selection, whole, in its folder."""
    pool = run.table("pool")
    chosen = {name: draws[0] for name, draws in run.selections().items()}
    return {"strategies": _write(run, run.folder / "selection", pool, chosen, _WHOLE)}


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        folder: that holds a folder for each strategy, and `export.json`.
        budget: that was met.
        figures: of each strategy: rows, tokens, rows of the repeats file, rows by source.
    """

    folder: Path
    budget: Budget
    figures: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        knee = dict(self.budget.knee) if self.budget.knee else None
        return {"budget": str(self.budget), "knee": knee, "strategies": self.figures}


def export_budget(
    run: Run,
    request: BudgetRequest,
    strategies: Sequence[str] = (),
    folder: Path | None = None,
    repeats: int | None = None,
) -> Exported:
    """Write the part of every selection that meets a budget; the run itself stays as it is.

    Only the cleaned pool and the selections are read: no gradients, and no model.

    Args:
        run: whose selections are made.
        request: the budget.
        strategies: whose selections; none: all that are configured.
        folder: gets the files; None: `exports/<budget>` of the run folder.
        repeats: rows of the repeats file; None: four times the chosen ones.

    Raises:
        RunError: the selection is not complete, or the folder holds something else.
        ConfigError: a strategy is not one of the run's.
        SelectionError: a selection cannot meet the budget; nothing is written.
    """
    from gradpursuit.files import sha256_of, write_folder
    from gradpursuit.selection.budget import resolve, within_budget
    from gradpursuit.selection.export import read_selection

    configured = run.config.selection.strategies
    for name in strategies:
        if name not in configured:
            raise ConfigError(f"strategy '{name}' is not among those that chose; {nearest(name, configured)}")
    if folder is not None and re.match(r"[A-Za-z][\w+.-]+:/", str(folder)):  # of a URL, a path keeps one slash
        raise ConfigError(f"--out {folder}: an export lies on a disk; name a folder, and copy it from there")
    elsewhere = folder is not None
    folder = folder or run.folder / "exports" / _name(run, request)
    _refuse_place(run, folder)
    with run.working("export"):
        _refuse_foreign(folder)
        run.require("selection", "an export", without=("trajectory", "gradients"))
        pool = run.table("pool")
        selections = {
            name: read_selection(run.folder / "selection" / name, pool)[0] for name in strategies or configured
        }
        budget = resolve(request, pool, selections)
        chosen = {}
        for name, selection in selections.items():
            try:
                chosen[name] = within_budget(selection, budget, pool)
            except SelectionError as error:
                raise SelectionError(f"{name}: {error}") from None
        with write_folder(folder) as part:
            figures = _write(run, part, pool, chosen, str(budget), repeats)
            made = Exported(folder, budget, figures)
            asked = request.model_dump(mode="json", exclude_defaults=True)
            origin = {"selection": run.fingerprint("selection"), "asked": asked}
            files = {path.relative_to(part).as_posix(): path for path in sorted(part.rglob("*")) if path.is_file()}
            flags = _flags(request, strategies, folder if elsewhere else None, repeats)
            written = {"flags": flags, "files": {name: sha256_of(path) for name, path in files.items()}}
            write_sealed(part / EXPORT_RECORD, {**made.to_json(), **origin, **written})
    return made


def _refuse_place(run: Run, folder: Path) -> None:
    """An export lies in no folder that a stage of the run empties."""
    root, place = run.folder.resolve(), folder.resolve()
    inside = place.relative_to(root).parts if place.is_relative_to(root) else ("exports",)
    if not inside or inside[0] in ("data", "trajectory", "gradients", "selection", "evaluation", "targets"):
        raise RunError(f"{folder}: the run writes here itself; choose another folder (--out)")


def _refuse_foreign(folder: Path) -> None:
    """What is replaced must be an export, and hold nothing but its files."""
    settled(folder)
    if not os.path.lexists(folder):
        return
    made = folder / EXPORT_RECORD
    value = read_json(made) if made.is_file() else None
    strategies = value.get("strategies") if isinstance(value, dict) and "asked" in value else None
    if not isinstance(strategies, dict):
        raise RunError(
            f"{folder}: is there already and is no export, or has lost its {EXPORT_RECORD}; move it away, or choose "
            "another folder (--out)"
        )
    own = {made, *(folder / name for name in strategies)}
    own |= {folder / name / file for name in strategies for file in (*EXPORT_FILES, EXPORT_FOLDER)}
    found = [*folder.iterdir(), *(path for name in strategies for path in (folder / name).glob("*"))]
    saved = [path for name in strategies for path in (folder / name / EXPORT_FOLDER).glob("*")]
    others = [path for path in found if path not in own]
    others += [path for path in saved if not _SAVED.fullmatch(path.name)]
    if others:
        raise RunError(f"{others[0]}: no file of this export; move it elsewhere, or choose another folder (--out)")


def export_damage(folder: Path) -> tuple[list[Path], list[str]]:
    """Files of an exported budget that are missing or changed, and the flags that export it again.

    Raises:
        DamagedError: `export.json`, which knows them, is missing or damaged itself.
    """
    known = read_sealed(folder / EXPORT_RECORD)
    changed = [folder / name for name, digest in known["files"].items() if digest_now(folder / name) != digest]
    return changed, list(known["flags"])


def _flags(request: BudgetRequest, strategies: Sequence[str], folder: Path | None, repeats: int | None) -> list[str]:
    """The flags of an export on the command line."""
    words = []
    for name, value in request.model_dump(mode="json", exclude_defaults=True).items():
        flag = f"--{name.replace('_', '-')}"
        bounds = [f"{source}={bound}" for source, bound in value.items()] if isinstance(value, dict) else [str(value)]
        words += [word for bound in bounds for word in (flag, bound)]
    words += ["--strategies", ",".join(strategies)] if strategies else []
    words += ["--out", str(folder)] if folder else []
    return words + (["--repeats", str(repeats)] if repeats is not None else [])


def _write(
    run: Run, folder: Path, pool: Table, chosen: dict[str, Selection], budget: str, repeats: int | None = None
) -> dict[str, dict[str, Any]]:
    """The files of every strategy's rows; returns the figures of each."""
    from gradpursuit.selection.card import write_subset
    from gradpursuit.selection.subset import Subset

    figures = {}
    for name, selection in chosen.items():
        subset = Subset.of(selection, pool)
        figures[name] = write_subset(folder / name, subset, _origin(run, pool, name, budget), repeats)
    first = next(iter(figures.values()))
    for key, what in (
        ("columns_left_out", "the rows have such columns of their own, which stay as they are"),
        (
            "columns_as_text",
            "of several types, or values that a table would change: in Parquet and the saved data set as JSON text",
        ),
    ):
        if first[key]:
            logger.info("note: %s: %s", ", ".join(first[key]), what)
    return figures


def _origin(run: Run, pool: Table, strategy: str, budget: str) -> Origin:
    from gradpursuit.selection.card import Origin
    from gradpursuit.sources import short_names

    sources = pool.column("source")
    names = short_names(zip(sources, pool.column("file"), strict=True))
    model = Path(run.config.model.path)
    target = run.config.selection.target
    return Origin(
        strategy=strategy,
        budget=budget,
        model=model.name if model.exists() else run.config.model.path,
        target=f"the target '{target}'" if target else "the pool itself" if run.in_domain else "its target",
        pool=Counter(names[source] for source in sources),
        seed=run.config.seed,
    )


def _name(run: Run, request: BudgetRequest) -> str:
    """A folder's name for a budget; what users or data call their sources is no part of it."""
    asked = request.model_dump(mode="json", exclude_defaults=True)
    bounds = {name: asked.pop(name) for name in ("min_per_source", "max_per_source") if name in asked}
    asked.pop("count", None)
    parts = [f"{name}-{value}" for name, value in asked.items()] or ["whole"]
    if request.tokens is not None:
        parts.append(request.count)
    if run.config.selection.target:
        parts.append(f"for-{run.config.selection.target}")
    if bounds:
        parts.append(f"bounds-{digest_of(bounds)[:8]}")
    return "-".join(parts)
