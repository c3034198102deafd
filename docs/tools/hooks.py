"""What MkDocs calls with every page: formulas become MathML, and roles of Sphinx in docstrings plain code.

Browsers draw MathML themselves: a page needs no script and no network for it.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', re.DOTALL)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?")


def on_page_content(content: str, **_: Any) -> str:
    """The page as HTML; `pymdownx.arithmatex` has left formulas in it as LaTeX."""
    return _ROLE.sub("<code>", _FORMULA.sub(_mathml, content))


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[2] == "[" else "inline"
    return str(convert(html.unescape(found[3]), display=display))
