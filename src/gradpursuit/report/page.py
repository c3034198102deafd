"""The report's data as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from gradpursuit.report import charts
from gradpursuit.report.terminal import duration, size
from gradpursuit.report.texts import figure

_FOLDER = "page"


def render(report: Mapping[str, Any]) -> str:
    """The page: styles and script inside, every text of the data escaped, every request forbidden."""
    script = _read("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            charts=charts,
            style=Markup(_read("report.css")),
            script=Markup(script),
            script_digest=digest,
        )
    )


@cache
def _environment() -> Environment:
    """What keeps the templates, compiled at first use."""
    made = Environment(
        loader=FunctionLoader(_read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.filters |= {"duration": duration, "size": size, "yaml": _yaml, "percent": _percent, "figure": figure}
    made.tests["given"] = lambda part: not (isinstance(part, Mapping) and "missing" in part)
    return made


def _read(name: str) -> str:
    return files("gradpursuit.report").joinpath(_FOLDER, name).read_text("utf-8")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _percent(share: float) -> str:
    """0.004 as 0.4 %, 0.31 as 31 %."""
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
