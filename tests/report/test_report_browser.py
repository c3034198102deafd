"""The report in real browsers: Chromium, and the Chromium inside Qt WebEngine, which the test extra brings along."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

websocket = pytest.importorskip("websocket", reason="needs websocket-client, of the extra 'test'")

from browser import Browser, browser, chromium, qt_trouble  # noqa: E402
from gradpursuit.report.page import render  # noqa: E402

PAPER = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module", params=["qt", "chromium"])
def screen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if request.param == "chromium" and chromium() is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium); Qt WebEngine runs the same tests")
    if request.param == "qt" and (trouble := qt_trouble()):
        pytest.skip(f"Qt WebEngine cannot start on this machine: {trouble}")
    with browser(request.param, tmp_path_factory.mktemp(request.param)) as made:
        yield made


def ranks(screen: Browser) -> list[int]:
    found: list[int] = screen.run(
        "[...document.querySelectorAll('#row-table tbody tr')].filter(r => !r.hidden).map(r => +r.dataset.rank)"
    )
    return found


def test_the_checks_of_this_module_can_fail(screen: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<body style='width: 900px'><script>console.error('x'); throw Error('y')</script><img src='http://127.0.0.1:9/z'>"
    )
    screen.open(bad, width=360)
    assert any("x" in trouble for trouble in screen.troubles)
    assert any("y" in trouble for trouble in screen.troubles)
    assert "http://127.0.0.1:9/z" in screen.requests
    assert screen.run("document.documentElement.scrollWidth") > 360


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_opens_without_trouble_and_asks_nobody(screen: Browser, page: Path, dark: bool) -> None:
    screen.open(page, dark=dark)
    assert screen.troubles == []
    assert screen.requests == [page.as_uri()]
    assert screen.run("document.title") == "run · gradpursuit report", "no script of the data has run"
    assert screen.run("document.querySelectorAll('script').length") == 1


def test_scripts_of_the_data_could_not_run_even_if_they_were_let_in(
    screen: Browser, report: dict[str, Any], tmp_path: Path
) -> None:
    html = render(report).replace("<main", "<script>document.title = 'broken'</script><main", 1)
    path = tmp_path / "injected.html"
    path.write_text(html.replace("</main>", "<img src='http://127.0.0.1:9/z'></main>"), "utf-8")
    screen.open(path)
    assert screen.run("document.title") != "broken"
    assert any("Content Security Policy" in trouble for trouble in screen.troubles)


def test_charts_are_drawn(screen: Browser, page: Path) -> None:
    screen.open(page)
    drawn = screen.run(
        """[...document.querySelectorAll('svg')].map(svg => {
          const box = svg.getBoundingClientRect();
          const curves = [...svg.querySelectorAll('path:not(.grid)')].map(path => path.getBBox());
          return {width: box.width, height: box.height, curves: curves.map(b => [b.width, b.height])};
        })"""
    )
    assert len(drawn) == 4, "residual, two lengths, weights"
    for svg in drawn:
        assert svg["width"] > 200
        assert svg["height"] > 100
        assert len(svg["curves"]) >= 3
        assert all(max(curve) > 0 for curve in svg["curves"])
    bars = screen.run("[...document.querySelectorAll('.bars .bar span')].map(b => b.getBoundingClientRect().width)")
    assert len(bars) >= 3 + 2
    assert max(bars) > 50
    dots = screen.run("[...document.querySelectorAll('.track em')].map(d => d.getBoundingClientRect().width)")
    assert len(dots) == 4 * 2, "three strategies and the full pool, two seeds"
    assert min(dots) > 5


def test_rows_sort_by_keyboard(screen: Browser, page: Path, report: dict[str, Any]) -> None:
    screen.open(page)
    assert ranks(screen) == list(range(1, 9))
    screen.run("document.querySelector('#row-table th[data-key=tokens] button').focus()")
    screen.press("Enter")
    rows = report["rows"]["rows"]
    assert ranks(screen) == [row["rank"] for row in sorted(rows, key=lambda row: (-row["tokens"], row["rank"]))]
    assert screen.run("document.querySelector('th[data-key=tokens]').ariaSort") == "descending"
    assert screen.run("document.querySelectorAll('th[aria-sort]').length") == 1
    screen.press("Enter")
    assert ranks(screen) == [row["rank"] for row in sorted(rows, key=lambda row: (row["tokens"], row["rank"]))]
    screen.run("const by = document.getElementById('sort'); by.value = 'weight'; by.dispatchEvent(new Event('change'))")
    assert ranks(screen) == [row["rank"] for row in sorted(rows, key=lambda row: (-row["weight"], row["rank"]))]


def test_search_finds_words_in_the_texts(screen: Browser, page: Path, report: dict[str, Any]) -> None:
    screen.open(page)
    row = report["rows"]["rows"][3]
    words = row["blocks"][0]["text"].split(" <")[0]  # What is 7 plus 0?
    screen.run("document.getElementById('search').focus()")
    screen.type(words.upper())
    assert row["rank"] in ranks(screen)
    assert len(ranks(screen)) < 8
    assert screen.run("document.getElementById('count').textContent") == f"{len(ranks(screen))} of 8 rows"
    assert screen.run("document.getElementById('none').hidden")
    screen.type(" nothing has this")
    assert ranks(screen) == []
    assert not screen.run("document.getElementById('none').hidden")


def test_many_rows_come_a_few_at_a_time(screen: Browser, report: dict[str, Any], tmp_path: Path) -> None:
    row = report["rows"]["rows"][0]
    rows = [{**row, "id": f"row-{i}", "rank": i + 1, "weight": 1 + i / 60} for i in range(60)]
    path = tmp_path / "many.html"
    path.write_text(render({**report, "rows": {"strategy": "gtp", "chosen": 60, "rows": rows}}), "utf-8")
    screen.open(path)
    assert ranks(screen) == list(range(1, 26))
    screen.run("document.querySelector('th[data-key=weight] button').click()")
    assert ranks(screen) == list(range(60, 35, -1)), "sorting sorts all of them"
    screen.run("document.getElementById('more').click()")
    assert len(ranks(screen)) == 60
    assert screen.run("document.getElementById('more').hidden")


@pytest.mark.parametrize("width", [360, 320, 768, 1440])
def test_nothing_scrolls_sideways(screen: Browser, page: Path, width: int) -> None:
    screen.open(page, width=width)
    assert screen.run("document.documentElement.scrollWidth") <= width
    outside = screen.run(
        """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .text, svg'))
           .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert outside == []


CONTRAST = """(selector => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const [a, b] = [getComputedStyle(document.querySelector(selector)).color,
    getComputedStyle(document.body).backgroundColor].map(light);
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
})"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_light_and_dark_are_both_legible(screen: Browser, page: Path, dark: bool) -> None:
    screen.open(page, dark=dark)
    paper = screen.run(PAPER)
    assert (sum(map(int, paper[4:-1].split(", "))) < 3 * 128) == dark
    for selector in (
        "h1",
        "h1 span",
        "p",
        "nav a",
        "thead th",
        "summary",
        ".tag",
        "figcaption",
        ".axis span",
        "#theme",
    ):
        assert screen.run(f"{CONTRAST}({selector!r})") >= 4.5, selector
    screen.run("document.getElementById('theme').click()")
    assert screen.run(PAPER) != paper
    assert screen.run("document.getElementById('theme').textContent") == ("Dark" if dark else "Light")


def test_keyboards_and_screen_readers_find_their_way(screen: Browser, page: Path) -> None:
    screen.open(page)
    screen.press("Tab")
    assert screen.run("document.activeElement.textContent") == "Skip to the report"
    nodes = screen.call("Accessibility.getFullAXTree")["nodes"]
    names = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    roles = {role for role, _ in names}
    assert {"main", "navigation", "table", "columnheader", "searchbox", "status", "button", "image"} <= roles
    for role, name in names:
        if role in ("searchbox", "combobox", "button", "image", "link", "navigation", "region", "heading"):
            assert name.strip(), role
    levels = screen.run("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = screen.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert screen.run(
        "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))"
    )
    assert screen.run("[...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0 && e.ariaLabel)")


def test_without_scripts_every_row_is_there(screen: Browser, page: Path) -> None:
    screen.allow_scripts(False)
    try:
        screen.open(page)
        rows = screen.run("document.querySelectorAll('#row-table tbody tr').length")
        assert rows == 8
        assert screen.run("document.getElementById('row-tools').hidden"), "no control that does nothing"
    finally:
        screen.allow_scripts(True)
