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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpursuit.data.template_file import is_template_text
from gradpursuit.errors import ConfigError, DataError, ModelError

Span = tuple[int, int]  # of characters
SECONDS = 10.0  # for one conversation; a thousandth is usual
_START = 120.0  # seconds until the process is ready, on a busy machine
_TOGETHER = 1 << 20  # characters that are rendered of one line
_WAY_ON = "fix the template, or give another one in data.chat_template"


@dataclass(frozen=True)
class Request:
    """What is to be rendered of one conversation.

    Attributes:
        messages: of the conversation.
        tools: their JSON schemas; empty: none.
        parts: for each text, how many of the messages it has, and whether it asks for an answer at the end.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    parts: Sequence[tuple[int, bool]] = ()


def rendered(
    template: str, requests: Sequence[Request], variables: Mapping[str, Any], *, marks: bool = False
) -> Iterator[tuple[str, list[Span]] | DataError]:
    """The texts that a chat template makes of conversations; many at a time cost fewer ways to the other process.

    Args:
        template: its source.
        requests: the conversations.
        variables: for the template, special tokens among them.
        marks: find what `{% generation %}` marks, too.

    Yields:
        For every part of every request the text and the marked spans in it, in characters, or why there is none.

    Raises:
        ModelError: the template takes too long, or too much memory.
    """
    head = json.dumps({"template": template, "variables": dict(variables), "marks": marks}, default=_plain)[:-1]
    waiting, size = list[tuple[Request, str | DataError]](), 0
    for request in requests:
        line = _line_of(request)
        cost = len(line) * len(request.parts) if isinstance(line, str) else 0
        if size + cost > _TOGETHER:
            yield from _answered(head, waiting)
            waiting, size = [], 0
        waiting.append((request, line))
        size += cost
    yield from _answered(head, waiting)


def _line_of(request: Request) -> str | DataError:
    conversation = {
        "messages": [dict(message) for message in request.messages],
        "tools": [dict(tool) for tool in request.tools],
        "parts": list(request.parts),
    }
    try:
        return json.dumps(conversation, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        return DataError(f"the chat template cannot be given this conversation: {error}")


def _answered(
    head: str, waiting: Sequence[tuple[Request, str | DataError]]
) -> Iterator[tuple[str, list[Span]] | DataError]:
    """The texts of some requests, which go to the process as one line."""
    lines = [line for _, line in waiting if isinstance(line, str)]
    number = sum(len(request.parts) for request, line in waiting if isinstance(line, str))
    whole = f'{head}, "conversations": [{", ".join(lines)}]}}\n'.encode("ascii")
    answers = iter(_process().ask(whole, number) if lines else ())
    for request, line in waiting:
        for _ in request.parts:
            yield _text_of(next(answers)) if isinstance(line, str) else line


def _text_of(answer: Mapping[str, Any]) -> tuple[str, list[Span]] | DataError:
    if "limit" in answer:
        raise ModelError(f"the chat template {answer['limit']} for one conversation; {_WAY_ON}")
    if "error" in answer:
        return DataError(f"the chat template refuses this conversation: {answer['error']}")
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
    (answer,) = _process().ask(json.dumps({"check": source}).encode("ascii") + b"\n", 1)
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

    def ask(self, line: bytes, number: int) -> list[dict[str, Any]]:
        """The answers to one line, so many; fewer if the last one is that a limit was reached."""
        with self._lock:
            running = self._running or self._start()
            assert running.stdin
            try:
                running.stdin.write(line)
                running.stdin.flush()
                return self._answers(running, number)
            except BaseException as error:  # Ctrl-C, too: a later answer must not be taken for that of a later request
                self.end()
                if isinstance(error, TimeoutError):
                    raise ModelError(
                        f"the chat template takes more than {SECONDS:g} seconds for one conversation; {_WAY_ON}"
                    ) from None
                if isinstance(error, OSError):
                    raise ModelError(f"the chat template ended the process that it ran in; {_WAY_ON}") from None
                raise

    def _answers(self, running: subprocess.Popen[bytes], number: int) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = []
        while len(answers) < number:
            answers.append(json.loads(self._line(running, SECONDS)))
            if "limit" in answers[-1]:
                self.end()  # its memory is not to be trusted to come back
                break
        return answers

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
