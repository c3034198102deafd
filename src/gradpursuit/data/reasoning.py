"""The keys of a turn that hold what the assistant thinks before it speaks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gradpursuit.errors import DataError

_BLOCKS = ("reasoning_details", "thinking_blocks")  # lists of parts: as OpenRouter, and as LiteLLM writes them
# Keys under which an assistant turn keeps what it thinks before it speaks, as text.
REASONING = (
    *("reasoning_content", "thinking", "reasoning", "thought", "thoughts", "think", "think_content"),
    *("thinking_content", "reasoning_text", "chain_of_thought", "cot", "rationale", "scratchpad", "tool_plan"),
    *_BLOCKS,
)
_TEXTS = ("thinking", "text", "summary", "reasoning", "content")


def require_text(rest: dict[str, Any], where: str) -> None:
    """Refuse reasoning that is no text: a template would print it as Python does, or leave it out unseen.

    Blocks become `reasoning_content`, or go if another key has the same text.

    Args:
        rest: the keys of an assistant turn; changed.
        where: its place, for messages.

    Raises:
        DataError: naming the key.
    """
    for name in _BLOCKS:
        blocks = _list_of(rest.get(name))
        if blocks:
            text = "".join(_text_of_block(block, f"{where}: '{name}'[{i}]") for i, block in enumerate(blocks))
            del rest[name]
            _merge(text, rest, name, where)
    for name in REASONING:
        if rest.get(name) and not isinstance(rest[name], str):
            raise DataError(
                f"{where}: '{name}' is {type(rest[name]).__name__}, {rest[name]!r:.60}; expected the reasoning as text"
            )


def _merge(text: str, rest: dict[str, Any], name: str, where: str) -> None:
    """Add the text of blocks to the keys of a turn."""
    others = {key: rest[key] for key in REASONING if rest.get(key) and isinstance(rest[key], str)}
    if any("".join(other.split()) == "".join(text.split()) for other in others.values()):
        return
    if others:
        raise DataError(f"{where}: '{name}' holds other reasoning than {next(iter(others))!r}; keep one of them")
    rest["reasoning_content"] = text


def _text_of_block(block: Any, where: str) -> str:
    if isinstance(block, str):
        return block
    found = [block[name] for name in _TEXTS if isinstance(block.get(name), str)] if isinstance(block, Mapping) else []
    if not found:
        raise DataError(f"{where} holds reasoning that is no text, {block!r:.60}; remove it, or write it as text")
    return str(found[0])


def _list_of(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            found = json.loads(value) if value.lstrip()[:1] == "[" else None
        except (ValueError, RecursionError):
            found = None
        value = found if isinstance(found, list) else [value] if value.strip() else []
    return value if isinstance(value, list) else []
