"""A row's original columns as a person reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

LIMIT = 1_200  # characters of one row that are shown
_CONVERSATIONS = ("messages", "conversations", "conversation")
FIELDS = ("system", "instruction", "input", "question", "prompt", "completion", "output", "response", "answer", "text")


def blocks(columns: Mapping[str, Any], limit: int = LIMIT) -> list[dict[str, str]]:
    """The row as labelled pieces of text, in order: turns of a conversation, prompt and completion, or the whole.

    Returns:
        `{"label": ..., "text": ...}` for each; what goes beyond `limit` characters in all is left out, and said.
    """
    shown, left = [], limit
    for label, text in _pieces(columns):
        if left <= 0 and text:
            shown.append({"label": "…", "text": f"more, not shown here: {label}, {len(text):,} characters"})
            continue
        kept = text if len(text) <= left else f"{text[:left]}… ({len(text) - left:,} more characters)"
        left -= len(text)
        if text:
            shown.append({"label": label, "text": kept})
    return shown


def line(columns: Mapping[str, Any], limit: int = 160) -> str:
    """The first words of a row, on one line."""
    text = " · ".join(" ".join(piece.split()) for _, piece in _pieces(columns) if piece.strip())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def figure(value: float, *, places: int = 3, signed: bool = False) -> str:
    """A number with a true minus sign, if it is not zero as it is shown."""
    text = f"{value:{'+' if signed else ''}.{places}f}"
    return (text if float(text) else text.lstrip("+-")).replace("-", "−")


def _pieces(columns: Mapping[str, Any]) -> list[tuple[str, str]]:
    for name in _CONVERSATIONS:
        if isinstance(columns.get(name), Sequence) and not isinstance(columns[name], str):
            return [_turn(turn) for turn in columns[name]]
    found = [piece for name in FIELDS for piece in _field(name, columns.get(name))]
    return found or [("row", json.dumps(columns, ensure_ascii=False))]


def _field(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(name, value)]
    if isinstance(value, Sequence):  # prompt and completion may be lists of messages
        return [_turn(turn) for turn in value]
    return []


def _turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        return "turn", str(turn)
    label = turn.get("role", turn.get("from", "turn"))
    content = turn.get("content", turn.get("value"))
    return str(label), content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
