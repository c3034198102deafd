"""Which schema a row has, and the conversation that it holds.

| schema | columns |
|---|---|
| messages | `messages`: a list of `{"role", "content"}`, with whatever else the chat template reads |
| prompt/completion | two strings, or two lists of messages; the messages of the prompt are context |
| Alpaca | `instruction` and `output`, and perhaps `input` and `system` |
| ShareGPT | `conversations`: a list of `{"from", "value"}` |
| text | `text`: plain text, all of it supervised |

A column without a value is as if it were not there. `tools` (a list of JSON schemas, or its JSON text) and, where the
conversation has none, `system` are used beside any schema of conversations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gradpursuit.config import ColumnName
from gradpursuit.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
SCHEMAS = (
    "'messages', 'prompt' and 'completion', 'instruction' and 'output' (Alpaca), 'conversations' (ShareGPT) or 'text'"
)
_SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """What a row says.

    Attributes:
        messages: `{"role", "content", ...}` each; none if the row is plain text.
        first: messages before this one are context: never supervised but in mode `full`.
        tools: JSON schemas of the tools that the assistant may call.
        text: of a row that is plain text.
        untrained: positions of assistant messages that the row itself excludes from supervision (`weight: 0`).
        notes: what the row holds that is not read, one sentence each; no part of the identity.
    """

    messages: tuple[Message, ...] = ()
    first: int = 0
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    untrained: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

    def folded(self) -> list[Any]:
        """What identifies it whatever the template: roles and texts, runs of white space folded, and all else."""
        if self.text is not None:
            return ["text", " ".join(self.text.split())]
        parts = []
        for message in self.messages:
            more = {name: value for name, value in message.items() if name not in ("role", "content")}
            parts.append([message["role"], " ".join(message["content"].split())] + ([more] if more else []))
        unlearned: list[Any] = [["untrained", *sorted(self.untrained)]] if self.untrained else []
        return [*parts, *self.tools, *unlearned]


def recognise(columns: Mapping[str, Any], renamed: Mapping[ColumnName, str], where: str) -> tuple[str, Conversation]:
    """The name of the schema of a row, and its conversation.

    Args:
        columns: of the row.
        renamed: our name of a column to the row's name of it; with any column of a schema among them, only those
            are looked at.
        where: the place of the row, for messages.

    Raises:
        DataError: there is no known schema, or a column holds something else.
    """
    view = _view(columns, renamed, where)
    for name, (needed, read) in _READERS.items():
        if all(view.get(column) is not None for column in needed):
            return name, _with_extras(read(view, where), view, where)
    found = ", ".join(f"'{name}'{'' if value is not None else ' (null)'}" for name, value in columns.items()) or "none"
    hint = "; name the columns in data.columns, as in {prompt: question, completion: answer}" if columns else ""
    raise DataError(f"{where}: columns found: {found}; expected {SCHEMAS}{hint}")


def _view(columns: Mapping[str, Any], renamed: Mapping[ColumnName, str], where: str) -> dict[str, Any]:
    if not renamed:
        return dict(columns)
    for ours, theirs in renamed.items():
        if theirs not in columns:
            found = ", ".join(f"'{name}'" for name in columns) or "none"
            raise DataError(f"{where}: data.columns takes '{ours}' from column '{theirs}'; columns found: {found}")
    mapped: dict[str, Any] = {ours: columns[theirs] for ours, theirs in renamed.items()}
    if any(name in renamed for needed, _ in _READERS.values() for name in needed):
        return {**{name: columns.get(name) for name in ("tools",)}, **mapped}
    return {**columns, **mapped}


def _messages(view: Mapping[str, Any], where: str) -> Conversation:
    return Conversation(_conversation(view["messages"], f"{where}: 'messages'"))


def _prompt_completion(view: Mapping[str, Any], where: str) -> Conversation:
    prompt, completion = view["prompt"], view["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Conversation((_message("user", prompt), _message("assistant", completion)))
    if isinstance(prompt, list) and isinstance(completion, list):
        head = _conversation(prompt, f"{where}: 'prompt'")
        return Conversation(head + _conversation(completion, f"{where}: 'completion'"), first=len(head))
    raise DataError(
        f"{where}: 'prompt' is {type(prompt).__name__} and 'completion' is {type(completion).__name__}; "
        "expected two strings or two lists of messages"
    )


def _alpaca(view: Mapping[str, Any], where: str) -> Conversation:
    instruction, output = _text(view, "instruction", where), _text(view, "output", where)
    more = _text(view, "input", where) if view.get("input") is not None else ""
    asked = f"{instruction}\n\n{more}" if more.strip() else instruction
    return Conversation((_message("user", asked), _message("assistant", output)))


def _sharegpt(view: Mapping[str, Any], where: str) -> Conversation:
    turns = _parsed(view["conversations"])
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{where}: 'conversations': expected a list of {{'from', 'value'}} objects, found {turns!r:.80}"
        )
    if all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return Conversation(_conversation(turns, f"{where}: 'conversations'"))
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(
                f"{where}: 'conversations'[{index}]: expected 'from' and a text 'value', found {turn!r:.80}"
            )
        role = _SHAREGPT.get(turn["from"]) if isinstance(turn.get("from"), str) else None
        if role is None:
            known = ", ".join(_SHAREGPT)
            raise DataError(f"{where}: 'conversations'[{index}]: 'from' is {turn.get('from')!r}, not one of {known}")
        messages.append(_message(role, turn["value"]))
    return Conversation(tuple(messages))


def _plain(view: Mapping[str, Any], where: str) -> Conversation:
    return Conversation(text=_text(view, "text", where))


_READERS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], Conversation]]] = {
    "messages": (("messages",), _messages),
    "prompt/completion": (("prompt", "completion"), _prompt_completion),
    "Alpaca": (("instruction", "output"), _alpaca),
    "ShareGPT": (("conversations",), _sharegpt),
    "text": (("text",), _plain),
}


def _with_extras(found: Conversation, view: Mapping[str, Any], where: str) -> Conversation:
    if found.text is not None:
        return found
    if view.get("system") is not None and found.messages[0]["role"] not in ("system", "developer"):
        system = _text(view, "system", where)
        if system.strip():
            head = _message("system", system)
            found = replace(found, messages=(head, *found.messages), first=found.first + 1 if found.first else 0)
    tools = _parsed(view.get("tools"))
    if tools is None or tools == [] or tools == "":
        return found
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: 'tools': expected a list of JSON schemas, found {tools!r:.80}")
    return replace(found, tools=tuple(tools))


def _conversation(value: Any, where: str) -> tuple[Message, ...]:
    value = _parsed(value)
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a list of {{'role', 'content'}} objects, found {value!r:.80}")
    return tuple(_checked(message, f"{where}[{index}]") for index, message in enumerate(value))


def _checked(message: Any, where: str) -> Message:
    """A message with a known role, text as its content, and no keys without a value."""
    if not isinstance(message, dict):
        raise DataError(f"{where}: expected 'role' and a text 'content', found {message!r:.80}")
    role, calls = message.get("role"), message.get("tool_calls")
    content = "" if message.get("content") is None and calls else message.get("content")
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: expected 'role' and a text 'content', found {message!r:.80}")
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}")
    made = {name: value for name, value in message.items() if value is not None}
    made["content"] = content
    if calls:
        made["tool_calls"] = [
            _call(call, f"{where}: 'tool_calls'[{i}]") for i, call in enumerate(_listed(calls, where))
        ]
    return made


def _is_text_part(part: Any) -> bool:
    """Whether it is a part of a content that comes as a list, and holds text (not an image, or sound)."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _listed(calls: Any, where: str) -> list[Any]:
    calls = _parsed(calls)
    if not isinstance(calls, list):
        raise DataError(f"{where}: 'tool_calls': expected a list, found {calls!r:.80}")
    return calls


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, as chat templates expect them, not as the text of one."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: expected {{'function': {{'name', 'arguments'}}}}, found {call!r:.80}")
    arguments = _parsed(function.get("arguments"))
    function = {**function, "arguments": {} if arguments in (None, "") else arguments}
    return {**call, "function": function} if "function" in call else function


def _parsed(value: Any) -> Any:
    """What JSON text holds, where a table has no better way to hold a list or an object; any other value itself."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(view: Mapping[str, Any], name: str, where: str) -> str:
    value = view[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: '{name}' is {type(value).__name__}; expected text")
    return value
