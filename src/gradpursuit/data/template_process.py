"""Renders chat templates in another process, which is ended when one takes too long."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gradpursuit.data.template_file import is_template_text
from gradpursuit.errors import ConfigError, DataError, ModelError

Span = tuple[int, int]  # of characters
SECONDS = 10.0  # for one conversation; a thousandth is usual
_START = 120.0  # seconds until the process is ready, on a busy machine
_WAY_ON = "fix the template, or give another one in data.chat_template"


def rendered(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    prompt: bool = False,
    marks: bool = False,
) -> tuple[str, list[Span]]:
    """The text that a chat template makes of a conversation.

    Args:
        template: its source.
        messages: of the conversation.
        tools: their JSON schemas; empty: none.
        variables: for the template, special tokens among them.
        prompt: ask for an answer at the end.
        marks: find what `{% generation %}` marks, too.

    Returns:
        The text, and the marked spans in it, in characters.

    Raises:
        DataError: the template refuses the conversation.
        ModelError: the template takes too long, or too much memory.
    """
    request = {
        "template": template,
        "messages": [dict(message) for message in messages],
        "tools": [dict(tool) for tool in tools],
        "variables": dict(variables),
        "prompt": prompt,
        "marks": marks,
    }
    try:
        line = json.dumps(request, default=_plain).encode("ascii") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"the chat template cannot be given this conversation: {error}") from None
    answer = _process().ask(line)
    if "limit" in answer:
        raise ModelError(f"the chat template {answer['limit']} for one conversation; {_WAY_ON}")
    if "error" in answer:
        raise DataError(f"the chat template refuses this conversation: {answer['error']}")
    return answer["text"], [(start, stop) for start, stop in answer["spans"] if stop > start]


def check_template(source: str, value: str) -> None:
    """See that a template can be parsed; even that is done in the other process, since constants are computed then.

    Args:
        source: of the template.
        value: of the setting data.chat_template that it is from.

    Raises:
        ConfigError: naming the line of the first mistake.
        ModelError: it takes too long, or too much memory.
    """
    answer = _process().ask(json.dumps({"check": source}).encode("ascii") + b"\n")
    where = "data.chat_template" if is_template_text(value) else f"data.chat_template '{value}'"
    if "limit" in answer:
        raise ConfigError(f"{where}: the template {answer['limit']}; fix it")
    if "error" in answer:
        line = f"line {answer['line']}: " if answer.get("line") else ""
        raise ConfigError(f"{where}: {line}{answer['error']}; fix the template")


class _Process:
    """The process, started when it is first asked; one for all templates, and for all threads."""

    def __init__(self) -> None:
        self.owner = os.getpid()  # a fork has the pipes of its parent, and must not use them
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def ask(self, line: bytes) -> dict[str, Any]:
        """The answer to one request."""
        with self._lock:
            running = self._running or self._start()
            assert running.stdin
            try:
                running.stdin.write(line)
                running.stdin.flush()
                found = self._line(running, SECONDS)
            except BaseException as error:  # Ctrl-C, too: a later answer must not be taken for that of a later request
                self.end()
                if isinstance(error, TimeoutError):
                    raise ModelError(
                        f"the chat template takes more than {SECONDS:g} seconds for one conversation; {_WAY_ON}"
                    ) from None
                if isinstance(error, OSError):
                    raise ModelError(f"the chat template ended the process that it ran in; {_WAY_ON}") from None
                raise
            answer: dict[str, Any] = json.loads(found)
            if "limit" in answer:
                self.end()  # its memory is not to be trusted to come back
            return answer

    def end(self) -> None:
        """End the process, if it runs."""
        running, self._running, self._pending = self._running, None, b""
        if running is None or self.owner != os.getpid():
            return
        running.kill()
        for pipe in (running.stdin, running.stdout):
            with suppress(OSError):
                if pipe:
                    pipe.close()
        running.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        program = Path(__file__).with_name("template_worker.py")
        running = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._running = running
        try:
            self._line(running, _START)
        except OSError:
            self.end()
            raise ModelError(f"the process for chat templates does not start: {sys.executable} {program}") from None
        return running

    def _line(self, running: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert running.stdout
        until, parts = time.monotonic() + seconds, [self._pending]
        while b"\n" not in parts[-1]:
            left = until - time.monotonic()
            if left <= 0 or not select.select([running.stdout], [], [], left)[0]:
                raise TimeoutError
            part = os.read(running.stdout.fileno(), 1 << 20)
            if not part:
                raise BrokenPipeError
            parts.append(part)
        line, _, self._pending = b"".join(parts).partition(b"\n")
        return line


_the_process = _Process()


def _process() -> _Process:
    global _the_process
    if _the_process.owner != os.getpid():
        _the_process = _Process()
    return _the_process


@atexit.register
def _end() -> None:
    _the_process.end()


def _plain(value: Any) -> Any:
    """What a value that JSON does not have is to a template: its text where that says it, else its kind."""
    if type(value).__module__ in ("datetime", "decimal", "uuid"):
        return str(value)
    return value.tolist() if type(value).__module__ == "numpy" else f"<{type(value).__name__}>"
