from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from rich.console import Console

from gradpursuit.config import build_config
from gradpursuit.data import Row, Table
from gradpursuit.evaluation.table import Line
from gradpursuit.report import write_report
from gradpursuit.report.terminal import comparison_table, timing_table
from gradpursuit.selection import Selection

MANIFEST = {
    "format": 1,
    "created": "2025-01-01T00:00:00+00:00",
    "packages": {"torch": "2"},
    "machine": {"system": "Linux", "cores": 2},
    "stages": {
        "data": {
            "seconds": 1.0,
            "detail": {
                "rows": {"pool": 2, "target": 3, "heldout": 4},
                "distinct": 2,
                "dropped": {"pool: longer than max_tokens": 5},
            },
        },
        "selection": {
            "seconds": 2.25,
            "detail": {"target": "other", "rows": {"pool": 2, "target": 7, "heldout": 9}, "seconds": {"gtp": 2.0}},
        },
    },
}
LINES = [Line("gtp", 2, 0.0, 1, 8.0, [1.0, 2.0]), Line("random", 2, 1.0, 0, 8.0, [3.0, 5.0])]


class Page(HTMLParser):
    """Collects tags, the links that would leave the page, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def write(folder: Path) -> Page:
    config = build_config({"model": {"path": "m"}, "data": {"pool": "p", "target": "t"}}, "test")
    evil = json.dumps({"prompt": "<script>alert('x')</script><img src=http://evil.invalid/x>", "completion": "y" * 500})
    pool = Table([Row(f"id-{i}", f"h{i}", "pool.jsonl", i, evil, [1], [1]) for i in range(2)])
    path = [{"layer": 1.0, "relative_residual": r} for r in (1.0, 0.5, 0.25)]
    chosen = Selection(np.array([1, 0]), np.array([1.5, 0.5]), np.array([1, 1]), {"path": path})
    selections = {"gtp": [chosen], "random": [Selection.ranked([0, 1])]}
    write_report(folder, config, MANIFEST, LINES, selections, pool)
    return Page((folder / "report.html").read_text("utf-8"))


def test_page_is_self_contained_and_escapes_the_data(tmp_path: Path) -> None:
    page = write(tmp_path)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.links == []
    assert "url(" not in (tmp_path / "report.html").read_text("utf-8")
    text = "".join(page.words)
    assert "<script>alert('x')</script>" in text
    assert "1.500" in text  # mean of 1 and 2
    assert "5 × pool: longer than max_tokens" in text
    assert "target other: 7 target examples,\n9 held out" in text


def test_curve_ends_at_the_last_residual(tmp_path: Path) -> None:
    write(tmp_path)
    points = re.search(r'polyline points="([^"]+)"', (tmp_path / "report.html").read_text("utf-8"))
    assert points is not None
    first, *_, last = points.group(1).split()
    assert first == "40.0,20.0"
    assert last == "580.0,155.0"


def test_json_holds_the_same_figures(tmp_path: Path) -> None:
    write(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert [line["after"] for line in report["comparison"]] == [1.5, 4.0]
    assert report["selections"]["gtp"]["effective_examples"] == 4 / 2.5
    assert report["selections"]["gtp"]["top"][0]["id"] == "id-1"


def test_terminal_tables_show_every_seed_and_the_total() -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(comparison_table(LINES))
    console.print(timing_table(MANIFEST))
    text = console.export_text()
    for figure in ("1.000", "2.000", "1.500", "4.000", "8.000", "after, seed 1", "3.2"):
        assert figure in text
