"""The flags of `gradpursuit export` that name a budget, and what is done then."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpursuit.console import at_work

if TYPE_CHECKING:
    from gradpursuit.config import RunConfig

_BUDGET = ("k", "fraction", "tokens", "count", "min_per_source", "max_per_source")
_MORE = ("strategies", "folder", "repeats")


def add_export_flags(verb: argparse.ArgumentParser) -> None:
    """What can be asked of an export; without any of them it is a stage of the run."""
    group = verb.add_argument_group(
        "budgets", "of rows that were selected already, into a folder of their own; the run stays as it is"
    )
    group.add_argument("--k", type=_number_or_auto, metavar="N", help="rows, best first; auto: the knee of the pursuit")
    group.add_argument("--fraction", type=float, metavar="F", help="share of the cleaned pool")
    group.add_argument("--tokens", type=int, metavar="N", help="rows, best first, that hold at most so many tokens")
    group.add_argument("--count", metavar="WHICH", help="tokens that count: supervised (the default) or total")
    for name, word in (("--min-per-source", "least"), ("--max-per-source", "most")):
        text = f"{word} rows of a source, or share (0.3) of the exported rows; without NAME of every other; repeatable"
        group.add_argument(name, type=_bound, action="append", metavar="[NAME=]N", help=text)
    group.add_argument("--repeats", type=int, metavar="N", help="rows of repeated.jsonl (default: 4 for each row)")
    group.add_argument("--strategies", type=_names, metavar="A,B", help="whose selections (default: all)")
    group.add_argument("--out", dest="folder", type=Path, metavar="FOLDER", help="default: RUN/exports/<the budget>")


def asks_for_budget(arguments: argparse.Namespace) -> bool:
    """Whether any of the flags was given."""
    return bool(_given(arguments, *_BUDGET, *_MORE))


def export_with_budget(arguments: argparse.Namespace, config: RunConfig) -> None:
    """Export what the flags say, and tell what that was."""
    from gradpursuit.config import build_section
    from gradpursuit.export_stage import export_budget
    from gradpursuit.pipeline import Run
    from gradpursuit.report.terminal import Done, export_table
    from gradpursuit.selection.budget import BudgetRequest

    asked = _given(arguments, *_BUDGET)
    bounds: dict[str, Any] = {name: dict(asked[name]) for name in ("min_per_source", "max_per_source") if name in asked}
    request = build_section(BudgetRequest, {**asked, **bounds}, "export")
    made = Run(config)
    with at_work(made):
        found = export_budget(made, request, **_given(arguments, *_MORE))
    files = [found.folder / name for name in found.figures]
    following = shlex.join(["gradpursuit", "compare", str(made.folder)])
    sizes = sorted({figures["rows"] for figures in found.figures.values()})
    if found.budget.limit:  # each strategy's best rows, as many as one of them has here
        following += f" --evaluation.budgets {','.join(map(str, sizes))}"
    done = Done(found.folder, files, following, found.to_json(), [export_table(found)])
    done.print(as_json=arguments.json, quiet=arguments.quiet)


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    found = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _number_or_auto(text: str) -> int | str:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is neither a whole number nor auto")
    return text if text == "auto" else int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _bound(text: str) -> tuple[str, float]:
    """`NAME=50`, `NAME=0.3`, or a number alone, for every source that is not named."""
    name, _, number = text.rpartition("=")
    return name or "*", int(number) if number.isdigit() else float(number)
