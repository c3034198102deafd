"""The elements of a JSON list in a file, one after the other, as the standard library's parser reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

_CHUNK = 1 << 20
_AFTER = tuple(",] \t\r\n")
_SPACE = re.compile(r"[ \t\r\n]*")


def elements(file: IO[str]) -> Iterator[tuple[int, str, Any]]:
    """Number (from 1), text and value of every element of the list that `file` holds.

    Raises:
        json.JSONDecodeError: the file holds something else; its line is that in the file.
    """
    buffer = _Buffer(file)
    buffer.expect("[")
    number = 0
    while buffer.peek() != "]":
        if number:
            buffer.expect(",")
        number += 1
        yield number, *buffer.element()
    buffer.expect("]")
    if buffer.peek():
        raise buffer.error("Extra data")


class _Buffer:
    """The part of the file that is being parsed; what is done is forgotten."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._text, self._at, self._ended = file, "", 0, False
        self._lines = self._columns = 0  # that lie before the buffer
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more()

    def expect(self, character: str) -> None:
        """Step over `character`."""
        if self.peek() != character:
            raise self.error(f"Expecting '{character}'" + (" or ']'" if character == "," else ""))
        self._at += 1

    def element(self) -> tuple[str, Any]:
        """Step over a value: its text, and itself."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # A value that goes on beyond the buffer looks broken near its end, or in a string without one.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if self._ended or not cut:
                    raise self.error(error.msg, error.pos) from None
            else:
                could_go_on = isinstance(value, (int, float))  # as 1 in 1e5
                if not could_go_on or self._text[end : end + 1] in _AFTER or self._ended:
                    text, self._at = self._text[self._at : end], end
                    return text, value
            self._more()

    def error(self, message: str, at: int | None = None) -> json.JSONDecodeError:
        """An error at a place of the buffer, with its line in the file."""
        made = json.JSONDecodeError(message, self._text, self._at if at is None else at)
        made.colno += self._columns if made.lineno == 1 else 0
        made.lineno += self._lines
        return made

    def _more(self) -> None:
        """Read on; each time as much as is still needed, so that a long value is not parsed too often."""
        kept = len(self._text) - self._at
        done = self._text[: self._at]
        self._lines += done.count("\n")
        self._columns = len(done) - done.rfind("\n") - 1 + (0 if "\n" in done else self._columns)
        more = self._file.read(max(_CHUNK, kept))
        self._text, self._at, self._ended = self._text[self._at :] + more, 0, not more
