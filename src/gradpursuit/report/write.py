"""`report.json` and `report.html`: what was asked, what was chosen, how it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from gradpursuit.config import RunConfig
from gradpursuit.data import Table
from gradpursuit.evaluation.findings import Line
from gradpursuit.evaluation.table import to_json
from gradpursuit.files import write_json, write_text
from gradpursuit.selection import Selection

TOP_ROWS = 10
_TEXT = 400  # characters of a row shown in the page


def write_report(
    run_dir: Path,
    config: RunConfig,
    manifest: Mapping[str, Any],
    lines: Sequence[Line],
    selections: Mapping[str, Sequence[Selection]],
    pool: Table,
) -> None:
    """Write both files into `run_dir`; the page is self-contained and asks nothing of any network."""
    report: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "manifest": {key: value for key, value in manifest.items() if key != "format"},
        "comparison": to_json(lines),
        "selections": {name: _describe(draws[0], pool) for name, draws in selections.items()},
    }
    write_json(run_dir / "report.json", report)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("gradpursuit.report").joinpath("report.html.jinja").read_text("utf-8"))
    write_text(run_dir / "report.html", template.render(**report, curve=_curve(report["selections"])))


def _describe(selection: Selection, pool: Table) -> dict[str, Any]:
    weights = selection.weights
    return {
        "examples": len(selection.indices),
        "effective_examples": float(weights.sum() ** 2 / (weights**2).sum()),
        "sources": dict(Counter(pool[i].source for i in selection.indices.tolist())),
        "evidence": selection.evidence,
        "top": [
            {
                "rank": rank,
                "id": pool[index].id,
                "weight": float(weights[rank - 1]),
                "layer": int(selection.layers[rank - 1]),
                "text": pool[index].original[:_TEXT] + ("…" if len(pool[index].original) > _TEXT else ""),
            }
            for rank, index in enumerate(selection.indices.tolist()[:TOP_ROWS], 1)
        ],
    }


def _curve(selections: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every pursuit, its relative residual over passes of layer 1 as points of a 600 × 220 drawing."""
    curves = []
    for name, selection in selections.items():
        path = [r["relative_residual"] for r in selection["evidence"].get("path", []) if r["layer"] == 1]
        if len(path) > 1:
            points = [(40 + 540 * i / (len(path) - 1), 200 - 180 * value) for i, value in enumerate(path)]
            text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            curves.append({"name": name, "points": text, "last": path[-1], "passes": len(path) - 1})
    return curves
