"""Regular expressions of users and of checkpoints, which may take forever on a name: tried in a process of their own.

Python's `re` cannot be given a time limit, and `peft` matches with it. Names alone, without signs that repeat, are not
tried.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable

from gradpursuit.errors import ConfigError

_SECONDS = 10.0
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        found = re.compile(pattern)
    except Exception:
        continue
    for name in names:
        found.fullmatch(name)
"""


def repeats(pattern: str) -> bool:
    """Whether an expression has a sign that repeats something, without which it cannot take long."""
    return re.search(r"[*+{?]", pattern) is not None


def check_time(patterns: Iterable[str], names: Iterable[str], origin: str) -> None:
    """See that the expressions are matched with all names of modules in a moment; one that is none is passed over.

    Args:
        patterns: regular expressions.
        names: of a model's modules.
        origin: names the setting in the message.

    Raises:
        ConfigError: they take longer.
    """
    if not (repeating := list(filter(repeats, patterns))):
        return
    given = json.dumps([repeating, list(names)])
    try:
        subprocess.run(
            [sys.executable, "-I", "-c", _MATCH], input=given.encode(), timeout=_SECONDS, check=False,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{origin}: this regular expression takes more than {_SECONDS:.0f} s for the names of the model's modules; "
            "write it without a repetition inside a repetition, as in '(a+)+', or list the names"
        ) from None
