"""The process in which chat templates run: a program of its own, which imports nothing of this package.

A template is a program from a stranger. The sandbox of jinja2 keeps it from files and from Python, not from looping or
from filling memory, which only another process can be kept from. It reads requests and writes answers, each a line of
JSON; it ends with its input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

MEMORY = 1 << 30  # bytes beside what the libraries take
_TOO_MUCH = f"needs more than {MEMORY >> 20:,} MB of memory"
LONGEST = 1 << 25  # characters of a rendered text


def _bounded() -> None:
    """Limit the memory of this process, where the system can."""
    try:
        import resource

        taken = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass  # time is bounded all the same


def _answers(line: bytes) -> Iterator[dict[str, Any]]:
    """The answers to one line: one for every text that it asks for."""
    try:
        request = json.loads(line)
    except MemoryError:
        yield {"limit": _TOO_MUCH}
        return
    if "check" in request:
        yield _guarded(lambda: _checked(request["check"]))
        return
    for conversation in request["conversations"]:
        for end, prompt in conversation["parts"]:
            yield _guarded(partial(_rendered, request, conversation, end, prompt))


def _guarded(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except MemoryError:
        return {"limit": _TOO_MUCH}
    except RecursionError:
        return {"error": "it calls itself without end, or is nested too deeply"}
    except Exception as error:  # a template is a program of its own, and can fail in any way
        return {"error": str(error)[:2000] or type(error).__name__}


def _rendered(request: dict[str, Any], conversation: dict[str, Any], end: int, prompt: bool) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    made: Any = render_jinja_template(
        conversations=[conversation["messages"][:end]],
        tools=conversation["tools"] or None,
        chat_template=request["template"],
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=request["marks"],
        **request["variables"],
    )
    texts, spans = made
    if len(texts[0]) > LONGEST:
        return {"limit": f"writes more than {LONGEST:,} characters"}
    return {"text": texts[0], "spans": spans[0] if request["marks"] else []}


def _checked(template: str) -> dict[str, Any]:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(template)
    except TemplateSyntaxError as error:
        return {"error": str(error.message), "line": error.lineno}
    return {}


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints is no answer
    sys.path.pop(0)  # the folder of this file, whose names are not those of libraries
    import transformers.utils.chat_template_utils  # noqa: F401 - before memory is bounded

    _bounded()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        for answer in _answers(line):
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
