"""What is shown to people or written to logs: no control character steers a terminal, and no secret comes out.

Every text for the terminal or the log goes through :func:`shown` or, where it is the user's own data, through
:func:`escaped`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from rich.console import Console

_KEPT = frozenset("\n\t\u200c\u200d")  # joiners: emoji and scripts of India and Iran need them
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # control, format (bidi overrides), surrogates, line separators
_SPECIAL = re.compile(r"[^\x20-\x7e]")  # a text without any of these needs no look at each character

_SECRET_NAMES = re.compile(r"KEY|SECRET|TOKEN|PASS|CREDENTIAL|CONNECTION_STRING|AUTH|COOKIE", re.IGNORECASE)
_LEAST_SECRET = 8  # characters of a value of the environment that is taken for a secret
_LEAST_PASSWORD = 4  # characters of a password in a URL of the environment
_USERINFO = re.compile(r"//([^\s/?#'\"<>]+)@")
_NAMES = (
    r"pass(?:word|wd|phrase)?|pwd|secret|api[_-]?key|(?:secret[_-]?)?access[_-]?key(?:[_-]?id)?|private[_-]?key|"
    r"account[_-]?key|shared[_-]?access[_-]?signature|client[_-]?secret|(?:(?:access|api|auth|bearer|hf|hub|id|refresh|security|session)[_-]?)token|(?<!\w)token|signature|credentials?"
)
_SECRETS = (
    # A user and password of a URL, also of one that Path made `https:/…`, or whose password holds a slash.
    (re.compile(r"(//|:/)[^\s/?#'\"<>]*@"), r"\1***@"),
    (re.compile(r"(://?)[^\s/:?#'\"<>]+:[^\s:?#'\"<>]*@"), r"\1***@"),
    (re.compile(r"(:/[^\s?#'\"<>]*)\?[^\s'\"<>]+"), r"\1?***"),
    (re.compile(r"(:/[^\s?#'\"<>]*)#[^\s'\"<>]*=[^\s'\"<>]*"), r"\1#***"),
    (
        re.compile(r"([?&;](?:x-amz-[\w-]+|x-goog-[\w-]+|sig|sv|auth|key|code|" + _NAMES + r")=)[^\s&;'\"<>]+", re.I),
        r"\1***",
    ),
    # Headers, as libraries print them.
    (
        re.compile(
            r"((?:proxy-)?authorization|cookie|set-cookie|x-api-key|x-auth-token|x-amz-security-token|api-key)"
            r"(['\"]?\s*[:=]\s*b?)(?:'[^'\r\n]*'|\"[^\"\r\n]*\"|[^\r\n'\"]+)",
            re.IGNORECASE,
        ),
        r"\1\2***",
    ),
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE), r"\1 ***"),
    (
        re.compile(r"(?<![a-z])(" + _NAMES + r")(\s*=\s*|['\"]\s*:\s*(?=['\"]))(['\"]?)[^\s'\",;&)]+", re.IGNORECASE),
        r"\1\2\3***",
    ),
    # Keys that are known by their looks.
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{16,}"
            r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w-]{20,}|xox[abposr]-[\w-]{10,}|pypi-[\w-]{20,}"
            r"|npm_[A-Za-z0-9]{20,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
        ),
        "***",
    ),
)


def escaped(text: str, *, lines: bool = True) -> str:
    """`text` with control characters, marks that turn the direction of writing, and lone surrogates written out.

    Args:
        text: any text.
        lines: leave line breaks and tabs as they are; without it they are written out, too, as for one value.
    """
    if not _SPECIAL.search(text):  # line breaks and tabs are outside of it, too
        return text
    return "".join(char if _is_plain(char, lines) else _written_out(char) for char in text)


def _is_plain(char: str, lines: bool) -> bool:
    if char in _KEPT:
        return lines or char > "\x7f"
    return unicodedata.category(char) not in _HIDDEN


def _written_out(char: str) -> str:
    code = ord(char)
    if char in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[char]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def without_secrets(text: str) -> str:
    """`text` without users, passwords and signatures of URLs, keys, headers that prove who asks, and secrets of the
    environment."""
    for secret in _secrets_of_the_environment():
        text = text.replace(secret, "***")
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def shown(text: str, *, lines: bool = False) -> str:
    """`text` as a message may show it: escaped (line breaks too, unless `lines`), and without secrets."""
    return escaped(without_secrets(text), lines=lines)


def json_text(value: Any) -> str:
    """`value` as JSON that is readable, and plain text for a terminal: JSON's escapes stand for what steers one."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(char if _is_plain(char, True) else json.dumps(char)[1:-1] for char in text)


def rich_console(**settings: Any) -> Console:
    """A console of `rich` that writes out what would steer the terminal, in whatever it is given to print."""
    from rich.console import Console
    from rich.segment import Segment

    class Safe(Console):
        """Its own control sequences are no text, and stay."""

        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=escaped(segment.text))

    stream = sys.stderr if settings.pop("stderr", False) else sys.stdout
    return Safe(file=getattr(stream, "stream", stream), **settings)


def _secrets_of_the_environment() -> list[str]:
    """Secrets that environment variables hold, the longest first: their values by name, passwords of URLs."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) >= _LEAST_SECRET and not os.path.exists(value):  # noqa: PTH110
            found.add(value)
        for user in _USERINFO.findall(value):  # PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, HTTPS_PROXY, …
            password = user.rpartition(":")[2]
            found |= {part for part in (user, password) if len(part) >= _LEAST_PASSWORD}
    forms = {form for secret in found for form in (secret, unquote(secret), quote(secret, safe=""))}
    return sorted(forms, key=len, reverse=True)
