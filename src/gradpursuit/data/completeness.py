"""Whether all that a row says came through the chat template.

The conversation is rendered a second time with marks in it: after the first and the last word of every stretch of text
between tags, in names and in the arguments of tool calls. A template may trim, quote or re-order what it is given; a
mark that does not come up stood in something that it leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gradpursuit.data.reasoning import REASONING
from gradpursuit.data.schemas import Conversation, Message
from gradpursuit.data.turns import TOOLS_OF_TURN

_WORD = re.compile(r"[^\W_]+")
_TAG = re.compile(r"<[^<>\s][^<>]*>|\[/?[A-Z_]+\]")
_THINKS = re.compile(r"<[|/]?(think|thinking|thought|reasoning|reason)[|]?>", re.IGNORECASE)
_TEMPLATE = "data.chat_template takes a template that writes it"


@dataclass(frozen=True)
class Part:
    """One stretch of what a row says: its turn (from 0; -1: none), what it is, and the text or name itself."""

    turn: int
    kind: Literal["content", "reasoning", "call", "argument", "name", "tool"]
    text: str


class Marked:
    """A conversation with marks in it.

    Args:
        conversation: to be marked.
        template: the source of the chat template.

    Attributes:
        conversation: with the marks.
    """

    def __init__(self, conversation: Conversation, template: str) -> None:
        # A mark must not be in what the template writes of itself, nor in what it is given.
        self._mark, folded = "q", f"{template}{conversation.messages}{conversation.tools}".casefold()
        while self._mark + "0" in folded:
            self._mark += "q"
        self._parts: list[Part] = []
        self._row = conversation
        messages = tuple(self._message(i, message) for i, message in enumerate(conversation.messages))
        tools = tuple(self._renamed(tool, -1, "tool") for tool in conversation.tools)
        self.conversation = replace(conversation, messages=messages, tools=tools)

    def left_out(self, rendered: str, needed: set[int]) -> str:
        """What the template leaves out, in words, and what to do; empty: nothing.

        Args:
            rendered: the text of the marked conversation.
            needed: the turns whose reasoning has to come through; of others it may be cut, as it is when the model is
                asked.
        """
        there = {int(number) for number in re.findall(self._mark + r"(\d+)z", rendered.casefold())}
        lost = [
            part
            for number, part in enumerate(self._parts)
            if number not in there and (part.kind != "reasoning" or part.turn in needed)
        ]
        if not lost:
            return ""
        kept = {(part.turn, part.kind) for number, part in enumerate(self._parts) if number in there}
        return self._in_words(lost[0], whole=(lost[0].turn, lost[0].kind) not in kept)

    def _in_words(self, part: Part, *, whole: bool) -> str:
        turn, start = part.turn + 1, "the chat template leaves out"
        if part.kind == "tool" and part.turn >= 0:
            return f"{start} the tools of turn {turn} ('{part.text}'); {_TEMPLATE}, or move them to a column 'tools'"
        if part.kind == "tool":
            return f"{start} tools ('{part.text}'); {self._tools_advice()}"
        role = self._row.messages[part.turn]["role"]
        if part.kind == "call":
            return f"{start} tool calls (turn {turn} calls '{part.text}'); {_TEMPLATE}"
        if part.kind == "argument":
            return f"{start} an argument of a tool call (turn {turn}: {_short(part.text)}); {_TEMPLATE}"
        if part.kind == "name":
            return f"{start} the name '{part.text}' of turn {turn}; {_TEMPLATE}, or remove the key 'name'"
        if part.kind == "reasoning":
            keys = [key for key in REASONING if self._row.messages[part.turn].get(key)]
            where = f"'{keys[0]}'" if keys else "the part before </think> in its content"
            later = any(message["role"] == "assistant" for message in self._row.messages[turn:])
            last = "; with data.turns: last-turn it may cut that of earlier turns" if later else ""
            way = f"{_TEMPLATE}, or {'put it into the content as <think>...</think>, or ' if keys else ''}remove it"
            return f"{start} the reasoning of turn {turn} ({where}); {way}{last}"
        if not whole:
            return f"{start} a part of the {role} message of turn {turn} ({_short(part.text)}); {_TEMPLATE}"
        return f"{start} {role} messages (turn {turn}); {_TEMPLATE}"

    def _tools_advice(self) -> str:
        names = [str((tool.get("function") or tool).get("name", "")) for tool in self._row.tools]
        system = " ".join(message["content"] for message in self._row.messages if message["role"] == "system")
        if all(name in system for name in names):
            return "the system turn names them already, so data.columns: {tools: null} leaves the column out"
        return f"{_TEMPLATE}, and data.columns: {{tools: null}} leaves the column out"

    def _new(self, part: Part) -> str:
        self._parts.append(part)
        return f"{self._mark}{len(self._parts) - 1}z"

    def _message(self, turn: int, message: Message) -> Message:
        made = dict(message)
        made["content"] = self._text(turn, message["content"], "content")
        if message["role"] == "assistant":
            done: dict[str, str] = {}
            for key in REASONING:
                text = message.get(key)
                if isinstance(text, str):
                    if text not in done:
                        done[text] = self._text(turn, text, "reasoning")
                    made[key] = done[text]
        name = message.get("name")
        if message["role"] != "tool" and isinstance(name, str) and name.strip() and name != message["role"]:
            made["name"] = name + self._new(Part(turn, "name", name))
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            made["tool_calls"] = [self._renamed(call, turn, "call") for call in calls]
        for key in TOOLS_OF_TURN:
            if isinstance(message.get(key), list):
                made[key] = [self._renamed(tool, turn, "tool") for tool in message[key]]
        return made

    def _text(self, turn: int, text: str, kind: Literal["content", "reasoning"]) -> str:
        """A text with a mark after the first and the last word of every stretch between tags."""
        made = []
        assistant = self._row.messages[turn]["role"] == "assistant"
        for stretch, thinks in _stretches(text):
            this: Literal["content", "reasoning"] = "reasoning" if thinks and assistant else kind
            words = [] if _TAG.fullmatch(stretch) else list(_WORD.finditer(stretch))
            if words:
                places = dict.fromkeys((words[0].end(), words[-1].end()))
            else:
                places = {} if _TAG.fullmatch(stretch) or not stretch.strip() else {len(stretch.rstrip()): None}
            begin = 0
            for place in places:
                made += [stretch[begin:place], " ", self._new(Part(turn, this, stretch))]
                begin = place
            made.append(stretch[begin:])
        return "".join(made)

    def _renamed(self, value: Mapping[str, Any], turn: int, kind: Literal["call", "tool"]) -> dict[str, Any]:
        if isinstance(value.get("function"), Mapping):
            return {**value, "function": self._renamed(value["function"], turn, kind)}
        made = {**value, "name": self._new(Part(turn, kind, str(value.get("name", ""))))}
        if kind == "call" and "arguments" in value:
            made["arguments"] = self._arguments(value["arguments"], turn, top=True)
        return made

    def _arguments(self, value: Any, turn: int, *, top: bool = False) -> Any:
        if isinstance(value, Mapping):
            return {key: self._arguments(item, turn) for key, item in value.items()}
        if isinstance(value, list):
            return [self._arguments(item, turn) for item in value]
        if isinstance(value, str) and value.strip() and not top:
            return f"{value} {self._new(Part(turn, 'argument', value))}"
        return value


def _stretches(text: str) -> Iterator[tuple[str, bool]]:
    """Tags and what is between them, and whether it is reasoning."""
    first = _THINKS.search(text)
    thinks = first is not None and first[0][1] == "/"  # the tag that begins it was in the prompt
    begin = 0
    for tag in _TAG.finditer(text):
        yield text[begin : tag.start()], thinks
        yield tag[0], thinks
        if _THINKS.fullmatch(tag[0]):
            thinks = tag[0][1] != "/"
        begin = tag.end()
    yield text[begin:], thinks


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else line[:57] + "...")
