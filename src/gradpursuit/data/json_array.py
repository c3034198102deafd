"""The elements of a JSON list in a file, one after the other, as the standard library's parser reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from gradpursuit.data.json_text import unique
from gradpursuit.errors import DataError

_CHUNK = 1 << 20
_AFTER = tuple(",] \t\r\n")
_DECODER = json.JSONDecoder(object_pairs_hook=unique)
_LENIENT = json.JSONDecoder(parse_int=str)
_SPACE = re.compile(r"[ \t\r\n]*")


def elements(file: IO[str]) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and value of every element of the list that `file` holds; an error for one that cannot be used.

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
        yield number, buffer.element()
    buffer.expect("]")
    if buffer.peek():
        raise buffer.error("Extra data")


class _Buffer:
    """The part of the file that is being parsed; what is done is forgotten."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._text, self._at, self._ended = file, "", 0, False
        self._lines = self._columns = 0  # that lie before the buffer

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

    def element(self) -> Any:
        """Step over a value, and return it."""
        self.peek()
        while True:
            try:
                value, end = self._decoded()
            except json.JSONDecodeError as error:
                # A value that goes on beyond the buffer looks broken near its end, or in a string without one.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - 16
                if self._ended or not cut:
                    raise self.error(error.msg, error.pos) from None
            else:
                could_go_on = isinstance(value, (int, float))  # as 1 in 1e5
                if not could_go_on or self._text[end : end + 1] in _AFTER or self._ended:
                    self._at = end
                    return value
            self._more()

    def _decoded(self) -> tuple[Any, int]:
        """The value that begins here, or what is wrong with it alone; and where it ends."""
        try:
            return _DECODER.raw_decode(self._text, self._at)
        except json.JSONDecodeError:
            raise
        except DataError as error:
            return error, _LENIENT.raw_decode(self._text, self._at)[1]
        except ValueError as error:  # a number of thousands of digits
            return DataError(f"not usable JSON: {error}"), _LENIENT.raw_decode(self._text, self._at)[1]

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
