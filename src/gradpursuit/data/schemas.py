"""Which schema a row has, and the conversation that it holds.

| schema | columns |
|---|---|
| messages | `messages`: a list of `{"role", "content"}`, with whatever else the chat template reads |
| prompt/completion | strings, or lists of messages; the messages of the prompt are context |
| Alpaca | `instruction` and `output`, and perhaps `input`, `system` and `history` |
| ShareGPT | `conversations`: a list of `{"from", "value"}` |
| text | `text`: plain text, all of it supervised |

A column without a value is as if it were not there. Beside any schema of conversations are read `tools` (a list of JSON
schemas, or its JSON text; also OpenAI's `functions`) and, where the conversation has no system turn, `system` (also
`system_prompt`, `system_message`); beside two texts also `history`, pairs of earlier questions and answers. Other
columns that may belong to what is said are named in the notes of the conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gradpursuit.config import ColumnName
from gradpursuit.data.companions import notes, refuse_what_is_no_example, unknown
from gradpursuit.data.turns import Message, Turns, parsed, text_of
from gradpursuit.errors import DataError

SCHEMAS = (
    "'messages', 'prompt' and 'completion', 'instruction' and 'output' (Alpaca), 'conversations' (ShareGPT) or 'text'"
)
_SYSTEM = ("system", "system_prompt", "system_message")
_TOOLS = ("tools", "functions")
_ALSO = {"system": _SYSTEM, "tools": _TOOLS, "history": ("history",)}  # read by name beside the columns of a schema


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


def recognise(
    columns: Mapping[str, Any], renamed: Mapping[ColumnName, str | None], where: str
) -> tuple[str, Conversation]:
    """The name of the schema of a row, and its conversation.

    Args:
        columns: of the row.
        renamed: our name of a column to the row's name of it, or to None: not read. With any column of a schema among
            them, no other column of a schema is looked for by its own name.
        where: the place of the row, for messages.

    Raises:
        DataError: there is no known schema, or a column holds something else.
    """
    view = _View(columns, renamed, where)
    for name, (needed, read) in _READERS.items():
        if all(view.get(column) is not None for column in needed):
            refuse_what_is_no_example(columns, name, where)
            found = _with_extras(read(view), view)
            unread = notes(columns, view.read, view.off, found.messages, found.text)
            return name, replace(found, notes=(*found.notes, *unread))
    raise unknown(columns, renamed, SCHEMAS, where)


class _View:
    """The columns of a row by our names, which remembers those that were read.

    Attributes:
        where: the place of the row, for messages.
        read: the row's own names of the columns that were read.
        off: its names of columns that are left out on purpose.
    """

    def __init__(self, columns: Mapping[str, Any], renamed: Mapping[ColumnName, str | None], where: str) -> None:
        self._columns, self.where = columns, where
        self.read: set[str] = set()
        self.off: set[str] = {"id"}
        mapped: dict[str, str] = {ours: theirs for ours, theirs in renamed.items() if theirs is not None}
        for ours, theirs in mapped.items():
            if theirs not in columns:
                found = ", ".join(f"'{name}'" for name in columns) or "none"
                raise DataError(f"{where}: data.columns takes '{ours}' from column '{theirs}'; columns found: {found}")
        self._names: dict[str, str] = {name: name for name in columns}
        if any(name in mapped for name in _OF_A_SCHEMA):
            self._names = {also: also for names in _ALSO.values() for also in names}
            self.off.update(("chosen", "rejected"))
        for ours, source in renamed.items():
            for name in _ALSO.get(ours, (ours,)):
                self._names.pop(name, None)
            if source is None:
                self.off.update(_ALSO.get(ours, (ours,)))
        self._names.update(mapped)
        self.off.difference_update(mapped.values())

    def get(self, name: str) -> Any:
        """The value of a column, None if there is none."""
        return self._columns.get(self._names[name]) if name in self._names else None

    def take(self, name: str) -> Any:
        """The same of a column that is read."""
        if name in self._names:
            self.read.add(self._names[name])
        return self.get(name)

    def text(self, name: str) -> str:
        """The same of a column that holds text.

        Raises:
            DataError: it does not.
        """
        value = self.take(name)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: '{name}' is {type(value).__name__}; expected text")
        return value


def _messages(view: _View) -> Conversation:
    return _said(Turns().extend(view.take("messages"), f"{view.where}: 'messages'"))


def _prompt_completion(view: _View) -> Conversation:
    prompt, completion = (_turns_or_text(view.take(name)) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return _asked(view, prompt, completion)
    if isinstance(prompt, str) and isinstance(completion, list):
        prompt = [_message("user", prompt)]
    elif isinstance(prompt, list) and isinstance(completion, str):
        completion = [_message("assistant", completion)]
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = Turns().extend(prompt, f"{view.where}: 'prompt'")
        first = len(turns.messages)
        return replace(_said(turns.extend(completion, f"{view.where}: 'completion'")), first=first)
    raise DataError(
        f"{view.where}: 'prompt' is {type(prompt).__name__} and 'completion' is {type(completion).__name__}; "
        "expected strings or lists of messages"
    )


def _turns_or_text(value: Any) -> Any:
    """A text that is the JSON of turns, or a turn alone, as a list of turns; any other value itself."""
    found = parsed(value)
    if isinstance(found, dict):
        found = [found]
    turns = isinstance(found, list) and bool(found) and all(isinstance(turn, dict) and "role" in turn for turn in found)
    return found if turns else value


def _alpaca(view: _View) -> Conversation:
    instruction, output = view.text("instruction"), view.text("output")
    more = view.text("input") if view.get("input") is not None else ""
    return _asked(view, f"{instruction}\n\n{more}" if more.strip() else instruction, output)


def _asked(view: _View, question: str, answer: str) -> Conversation:
    """A question and its answer, after those of the column `history`."""
    turns = Turns()
    history = parsed(view.take("history"))
    if history not in (None, "", []):
        where = f"{view.where}: 'history'"
        if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
            turns.extend(history, where)
        else:
            for asked, answered in _pairs(history, where):
                turns.messages += [_message("user", asked), _message("assistant", answered)]
    turns.messages += [_message("user", question), _message("assistant", answer)]
    return _said(turns)


def _pairs(history: Any, where: str) -> list[list[str]]:
    if isinstance(history, list) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        return [list(pair) for pair in history]
    raise DataError(
        f"{where}: expected a list of [question, answer] pairs or of messages, found {history!r:.80}; "
        "data.columns: {history: null} leaves the column out"
    )


def _sharegpt(view: _View) -> Conversation:
    turns = Turns().extend(view.take("conversations"), f"{view.where}: 'conversations'", names="{'from', 'value'}")
    return _said(turns)


def _plain(view: _View) -> Conversation:
    return Conversation(text=view.text("text"))


_READERS: dict[str, tuple[tuple[str, ...], Callable[[_View], Conversation]]] = {
    "messages": (("messages",), _messages),
    "prompt/completion": (("prompt", "completion"), _prompt_completion),
    "Alpaca": (("instruction", "output"), _alpaca),
    "ShareGPT": (("conversations",), _sharegpt),
    "text": (("text",), _plain),
}
_OF_A_SCHEMA = frozenset(name for needed, _ in _READERS.values() for name in needed)


def _said(turns: Turns) -> Conversation:
    return Conversation(tuple(turns.messages), untrained=frozenset(turns.untrained), notes=tuple(turns.notes))


def _with_extras(found: Conversation, view: _View) -> Conversation:
    if found.text is not None:
        return found
    return _with_tools(_with_system(found, view), view)


def _with_system(found: Conversation, view: _View) -> Conversation:
    if found.messages[0]["role"] in ("system", "developer"):
        return found
    for name in _SYSTEM:
        value = parsed(view.get(name))
        if value is None:
            continue
        system = text_of(value, f"{view.where}: '{name}'") if isinstance(value, list) else view.text(name)
        view.take(name)
        if system.strip():
            return replace(
                found,
                messages=(_message("system", system), *found.messages),
                first=found.first + 1 if found.first else 0,
                untrained=frozenset(i + 1 for i in found.untrained),
            )
    return found


def _with_tools(found: Conversation, view: _View) -> Conversation:
    name = next((name for name in _TOOLS if not _is_blank(view.get(name))), "")
    if not name:
        for blank in _TOOLS:
            view.take(blank)
        return found
    tools = parsed(view.take(name))
    tools = [parsed(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("function", {}), dict) for tool in tools
    ):
        raise DataError(
            f"{view.where}: '{name}': expected a list of JSON schemas, found {tools!r:.80}; "
            "data.columns: {tools: null} leaves the column out"
        )
    tools = [_tool(tool, name) for tool in tools]
    names = [str(tool.get("function", tool).get("name", "")) for tool in tools]
    system = found.messages[0]["content"] if found.messages[0]["role"] in ("system", "developer") else ""
    if all(called and f'"{called}"' in system.replace("'", '"') for called in names):
        twice = (
            f"the tools of column '{name}' stand in the system turn too, so a chat template that renders tools gives "
            "them twice; data.columns: {tools: null} leaves the column out"
        )
        found = replace(found, notes=(*found.notes, twice))
    return replace(found, tools=tuple(tools))


def _is_blank(tools: Any) -> bool:
    """Whether there are no tools, however a table says so."""
    return (parsed(tools.strip()) if isinstance(tools, str) else tools) in (None, "", "null", "None", [], {})


def _tool(tool: dict[str, Any], column: str) -> dict[str, Any]:
    """A tool as chat templates expect it, out of OpenAI's earlier form (`functions`) or Anthropic's."""
    if "input_schema" in tool and "parameters" not in tool:
        tool = {"parameters" if name == "input_schema" else name: value for name, value in tool.items()}
        return {"type": "function", "function": tool}
    if column == "functions" and "function" not in tool:
        return {"type": "function", "function": tool}
    return tool


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
