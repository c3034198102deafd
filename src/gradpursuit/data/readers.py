"""Reading training examples from JSON Lines: which schema a row has, and what identifies it.

Schemas: `messages` (a list of {"role", "content"}), and `prompt`/`completion` (strings, or lists of messages).
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpursuit.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
SCHEMAS = "'messages', or 'prompt' and 'completion'"


@dataclass(frozen=True)
class Example:
    """One row as the user wrote it.

    Attributes:
        id: the row's own `id`, or a hash of its content; copies of one content get `-2`, `-3`, ...
        hash: sha256 over roles and texts, white space folded: equal for exact copies, whatever their id.
        source: the file it came from.
        line: its line there, from 1.
        messages: the conversation, `{"role", "content"}` each.
        columns: every original column, unchanged.
    """

    id: str
    hash: str
    source: str
    line: int
    messages: tuple[Mapping[str, str], ...]
    columns: Mapping[str, Any]


def read_examples(paths: Sequence[str]) -> list[Example]:
    """All examples of JSON Lines files, in order.

    Raises:
        DataError: a file is missing or empty, a line is not a JSON object or has no known schema (file and
            line named), or two rows carry the same `id`.
    """
    examples: list[Example] = []
    seen: dict[str, Example] = {}
    copies: dict[str, int] = {}
    for path in paths:
        before = len(examples)
        for line, columns in _json_lines(path):
            example = _example(columns, path, line, copies)
            if example.id in seen:
                other = seen[example.id]
                raise DataError(
                    f"{path}:{line}: id '{example.id}' is already used at {other.source}:{other.line}; "
                    "ids must be unique, or leave the 'id' column out"
                )
            seen[example.id] = example
            examples.append(example)
        if len(examples) == before:
            raise DataError(f"{path}: holds no examples; expected one JSON object a line with {SCHEMAS}")
    return examples


def content_hash(messages: Sequence[Mapping[str, str]]) -> str:
    """sha256 (hex) over roles and contents, with runs of white space folded to one space."""
    folded = [[message["role"], " ".join(message["content"].split())] for message in messages]
    return hashlib.sha256(json.dumps(folded, ensure_ascii=False).encode()).hexdigest()


def _json_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with Path(path).open("rb") as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                if not raw.strip():
                    continue
                try:
                    row = json.loads(raw.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: not UTF-8: {error.reason}; save it as UTF-8") from None
                except json.JSONDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}; "
                        "expected one JSON object a line"
                    ) from None
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}:{number}: not usable JSON: {error}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                if b"\\u" in raw:
                    _refuse_half_characters(row, f"{path}:{number}")
                yield number, row
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _refuse_half_characters(row: dict[str, Any], where: str) -> None:
    """JSON escapes can hold one half of a surrogate pair, which is no character and cannot be written as UTF-8."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{where}: holds half a character (\\u{ord(half):04x} alone); remove it") from None


def _example(columns: dict[str, Any], path: str, line: int, copies: dict[str, int]) -> Example:
    messages = _messages(columns, f"{path}:{line}")
    digest = content_hash(messages)
    own = columns.get("id")
    if own is None or own == "":
        copies[digest] = copies.get(digest, 0) + 1
        name = digest[:16] + (f"-{copies[digest]}" if copies[digest] > 1 else "")
    elif isinstance(own, (str, int)) and not isinstance(own, bool):
        name = str(own)
    else:
        raise DataError(f"{path}:{line}: 'id' is {own!r}; expected text or a whole number")
    return Example(name, digest, path, line, messages, columns)


def _messages(columns: Mapping[str, Any], where: str) -> tuple[Mapping[str, str], ...]:
    if "messages" in columns:
        return _conversation(columns["messages"], f"{where}: 'messages'")
    if "prompt" in columns and "completion" in columns:
        prompt, completion = columns["prompt"], columns["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
        if isinstance(prompt, list) and isinstance(completion, list):
            head = _conversation(prompt, f"{where}: 'prompt'")
            return head + _conversation(completion, f"{where}: 'completion'")
        raise DataError(
            f"{where}: 'prompt' is {type(prompt).__name__} and 'completion' is {type(completion).__name__}; "
            "expected two strings or two lists of messages"
        )
    found = ", ".join(f"'{name}'" for name in columns) or "none"
    raise DataError(f"{where}: columns found: {found}; expected {SCHEMAS}")


def _conversation(value: Any, where: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a list of {{'role', 'content'}} objects, found {value!r:.80}")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{where}[{index}]: expected 'role' and a text 'content', found {message!r:.80}")
        if message.get("role") not in ROLES:
            raise DataError(f"{where}[{index}]: role {message.get('role')!r} is not one of {', '.join(ROLES)}")
    return tuple({"role": message["role"], "content": message["content"]} for message in value)
