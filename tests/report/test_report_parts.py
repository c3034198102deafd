"""Texts and the geometry of charts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradpursuit.data import Table
from gradpursuit.report import charts, sections
from gradpursuit.report.texts import blocks, line
from gradpursuit.selection import Selection
from gradpursuit.sources import short_names
from problems import row


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"prompt": "a", "completion": "b"}, [("prompt", "a"), ("completion", "b")]),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            [("user", "a"), ("assistant", "b")],
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, [("human", "a")]),
        ({"instruction": "do", "input": "", "output": "done"}, [("instruction", "do"), ("output", "done")]),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, [("user", "a"), ("completion", "b")]),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, [("user", '[{"type": "text"}]')]),
        ({"x": 1}, [("row", '{"x": 1}')]),
    ],
)
def test_rows_read_as_their_schema_says(columns: dict[str, Any], wanted: list[tuple[str, str]]) -> None:
    assert [(block["label"], block["text"]) for block in blocks(columns)] == wanted


def test_long_rows_say_how_much_is_left_out() -> None:
    first, second = blocks({"prompt": "x" * 30, "completion": "y" * 40}, limit=20)
    assert first["text"] == "x" * 20 + "… (10 more characters)"
    assert second["text"] == "more, not shown here: completion, 40 characters"
    assert line({"prompt": "a\n b", "completion": "c"}) == "a b · c"
    assert line({"text": "z" * 50}, limit=10) == "z" * 9 + "…"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_cover_the_range(low: float, width: float, count: int) -> None:
    ticks = charts.round_ticks(low, low + width, count)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= low + width - 1e-6 * step
    assert 2 <= len(ticks) <= count + 2


def test_ticks_of_a_single_value() -> None:
    assert charts.round_ticks(0.5, 0.5)[0] <= 0.5 < charts.round_ticks(0.5, 0.5)[-1]


def test_curves_end_where_the_figures_do() -> None:
    path = [{"budget": 5, "relative_residual": 0.75}, {"budget": 10, "relative_residual": 0.5}]
    knee = {"budget": 5, "rule": "gain", "relative_residual": 0.75}
    chart = charts.residual_chart({"path": path, "knee": knee})
    curve = next(shape.path for shape in chart.shapes if shape.kind == "line")
    assert re.findall(r"[\d.]+ [\d.]+", curve) == ["0 0", "50 50", "100 100"]
    assert chart.note is not None
    assert (chart.note.place, chart.note.text) == (50, "knee: 5 rows")
    assert "falls from 1 without any row to 0.500 with 10 rows" in chart.summary


def test_many_weights_are_drawn_by_few_points() -> None:
    chart = charts.weights_chart([2.0] * 5000 + [0.0] * 5000)
    assert len(json.dumps(chart.shapes[0].path)) < 20_000
    assert chart.xs[-1].text == "10000"


def test_seeds_lie_within_the_scale() -> None:
    rows = [{"losses": [1.0, 2.0], "mean": 1.5, "low": 1.0, "high": 2.0}]
    (strip,) = charts.loss_strip(rows)
    assert (strip["seeds"], strip["mean"], strip["low"], strip["width"]) == ([0, 100], 50, 0, 100)
    (strip,) = charts.loss_strip([{**rows[0], "low": None, "high": None}])
    assert strip["low"] is None


def test_sources_are_told_by_names_of_which_no_two_are_the_same() -> None:
    paths = ("/x/a/data.jsonl", "/x/b/data.jsonl", "/x/b/more.jsonl")
    assert short_names((path, path) for path in paths) == {
        "/x/a/data.jsonl": "a/data.jsonl",
        "/x/b/data.jsonl": "b/data.jsonl",
        "/x/b/more.jsonl": "more.jsonl",
    }
    given = {"en/wiki": "/x/1.jsonl", "de/wiki": "/x/2.jsonl", "../../up/b": "/x/3.jsonl", "org/hub": "org/hub"}
    assert short_names(given.items()) == {name: name for name in given}
    assert short_names([("a/data.jsonl", "/x/c.jsonl"), (paths[0], paths[0])])[paths[0]] == "x/a/data.jsonl"
    assert short_names([(path, path) for path in ("/data.jsonl", "/x/data.jsonl")])["/data.jsonl"] == "/data.jsonl"


def test_rows_are_counted_under_their_source() -> None:
    rows = [row(i, source=f"/x/{'ab'[i % 2]}/data.jsonl") for i in range(5)]
    pool = Table([replace(made, file=made.source) for made in rows])
    (found,) = sections.mixes(pool, {"gtp": [Selection.ranked([0, 1, 2])]})
    assert found["values"] == [
        {"value": "a/data.jsonl", "pool": 3, "chosen": {"gtp": 2}},
        {"value": "b/data.jsonl", "pool": 2, "chosen": {"gtp": 1}},
    ]
    chosen = sections.chosen_rows(pool, Selection.ranked([1, 0]), "gtp")
    assert [one["source"] for one in chosen["rows"]] == ["b/data.jsonl", "a/data.jsonl"]
