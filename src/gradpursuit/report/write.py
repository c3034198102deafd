"""`report.html` and `report.json`: what was asked, what was chosen and why, and how it did."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpursuit.files import write_json, write_text
from gradpursuit.report import sections
from gradpursuit.report.absent import AbsentError, require
from gradpursuit.report.findings import findings
from gradpursuit.report.page import render

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run

FORMAT = 1
Parts = dict[str, Callable[[], Any]]


def write_report(run: Run, *, full: bool = False) -> list[Path]:
    """Write both files into the run folder; the page is self-contained and asks nothing of any network.

    What is not there yet is said, with the command that makes it.

    Args:
        run: at any stage after its data are clean.
        full: also what takes long with a large pool or budget.

    Returns:
        The two paths.

    Raises:
        RunError: the data are not clean yet, or a file of the run is broken.
    """
    report = gather(run, full=full)
    page, data = run.folder / "report.html", run.folder / "report.json"
    write_text(page, render(report))
    write_json(data, report)
    return [page, data]


def gather(run: Run, *, full: bool = False) -> dict[str, Any]:
    """Everything that the report holds, as JSON values; in place of a missing part `{"missing": why, "command": …}`."""
    run.require("data", "a report")
    parts = {**_about_run(run), **_about_selection(run, full), **_about_comparison(run)}
    report: dict[str, Any] = {"format": FORMAT, **{name: _given(part) for name, part in parts.items()}}
    return {**report, "findings": findings(report)}


def _given(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except AbsentError as absent:
        return absent.to_json()


def _about_run(run: Run) -> Parts:
    return {
        "asked": partial(sections.asked, run),
        "cleaning": partial(sections.cleaning, run),
        "timings": partial(sections.timings, run),
        "provenance": partial(sections.provenance, run),
    }


def _about_comparison(run: Run) -> Parts:
    from gradpursuit.report.comparison import comparison

    return {"comparison": partial(comparison, run)}


def _about_selection(run: Run, full: bool) -> Parts:
    """The parts about the chosen rows; about the primary strategy: the first one that pursues, or the first."""
    from gradpursuit.report.fitting import Fitting

    plain = ("strategies", "mixes", "lengths", "weights", "budgets")
    by_gradient = ("fit", "duplicates", "rows", "targets", "control")
    try:
        require(run, "selection")
    except AbsentError as absent:
        return dict.fromkeys((*plain, *by_gradient), absent.to_json)
    pool, selections = run.table("pool"), run.selections()
    primary = next((name for name, draws in selections.items() if "path" in draws[0].evidence), next(iter(selections)))
    parts: Parts = {
        "strategies": partial(sections.strategies, run, pool, selections),
        "mixes": partial(sections.mixes, pool, selections),
        "lengths": partial(sections.lengths, pool, selections),
        "weights": lambda: {"strategy": primary, **sections.weights(selections[primary][0])},
        "budgets": partial(sections.budgets, selections[primary][0], primary),
    }
    try:
        fitting = Fitting(run, pool, selections, primary, full=full)
    except AbsentError as absent:
        parts |= dict.fromkeys(by_gradient, absent.to_json)
        return {**parts, "rows": partial(sections.chosen_rows, pool, selections[primary][0], primary)}
    return {**parts, **{name: getattr(fitting, name) for name in by_gradient}}
