"""The turns of a conversation, in whatever form a row holds them, as messages that chat templates read.

| form | becomes |
|---|---|
| `role` and `content`; ShareGPT's `from` and `value`, and its names of roles | a message |
| content in parts: `text`, `thinking`, `tool_use`, `tool_result` | text, `reasoning_content`, calls, tool turns |
| OpenAI's `function_call`, and its role `function` | `tool_calls`, and role `tool` |
| turns `function_call` and `observation` (LLaMA-Factory) | an assistant turn with `tool_calls`, and a tool turn |
| pairs: `human` or `user` and `assistant`, `input` and `output`, perhaps `system` | messages |
| Gemini's `parts` | the content |
| `weight`, `train`, `loss`, ... | :attr:`Turns.untrained` |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradpursuit.data.json_text import unique
from gradpursuit.data.reasoning import REASONING, require_text
from gradpursuit.errors import DataError

Message = Mapping[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
_CALLS = (
    "function_call",
    "tool_call",
    "function-call",
    "tool-call",
    "function_calls",
    "tool_calls",
)  # names of a turn that is one or more calls
_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatbot", "chatgpt", "bing", "bard", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response", "tool_result"), "tool"),
    **dict.fromkeys(("function", "ipython"), "tool"),
    **dict.fromkeys(_CALLS, "assistant"),
    **{role: role for role in ROLES},
}
# 1 or true: the turn is learned. 0 or false: it is context.
_TRAIN = (
    *("weight", "train", "training", "trainable", "is_trainable", "do_train", "learn"),
    *("trained", "is_train", "learnable", "train_on", "train_on_turn", "train_mask", "include_in_loss"),
    *("loss", "loss_mask", "loss_weight", "loss_scale", "loss_multiplier", "loss_flag", "has_loss", "with_loss"),
    *("use_loss", "enable_loss", "compute_loss", "calculate_loss", "assistant_mask", "supervised", "supervise"),
)
_MASKED = (
    "masked",
    "is_masked",
    "ignored",
    "ignore_loss",
    "mask_loss",
    "no_loss",
    "skip_loss",
    "do_not_train",
)  # the other way round
_UNCLEAR = ("mask", "ignore")  # means either, depending on the library
# Any other key of such a name says something of what is learned, in a way that is not known.
_OF_LEARNING = re.compile(
    r"(?:^|_)(?:loss|train(?:ed|ing|able)?|untrain(?:ed|able)|learn(?:ed|able|ing)?|supervis\w*|(?:un)?mask(?:ed|s)?|"
    r"weights?|backprop|grad)(?:_|$)"
)
_PARENTS = ("parent", "parent_id", "parentId")
PAIRS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))  # keys of a turn that holds two
_TEXT_PARTS = ("text", "input_text", "output_text")
TOOLS_OF_TURN = ("tools", "functions")  # in a turn they are read by the chat template alone
_READ = frozenset(("tool_calls", "tool_call_id", *TOOLS_OF_TURN))
_SPOKEN_ELSEWHERE = ("refusal", "audio", "images", "image", "videos", "video", "audios", "files", "attachments")


@dataclass
class Turns:
    """Messages, as they are collected.

    Attributes:
        messages: `{"role", "content", ...}` each.
        untrained: positions of assistant messages that the row excludes from supervision.
        notes: what is not read, one sentence each.
    """

    messages: list[Message] = field(default_factory=list)
    untrained: set[int] = field(default_factory=set)
    notes: dict[str, None] = field(default_factory=dict)

    def extend(self, value: Any, where: str, *, names: str = "{'role', 'content'}") -> Turns:
        """Add the turns of a list, or of its JSON text.

        Raises:
            DataError: it is no list of turns, or a turn cannot be read without losing a part of it.
        """
        value = _of_columns(parsed(value))
        if not isinstance(value, list) or not value:
            python = (
                "; this is how Python prints a list: write it with json.dumps" if str(value).startswith("[{'") else ""
            )
            raise DataError(f"{where}: expected a list of {names} objects, found {value!r:.80}{python}")
        turns = [parsed(turn) for turn in value]
        _refuse_branches(turns, where)
        for index, turn in enumerate(turns):
            for part in _unpaired(turn):
                self._add(part, f"{where}[{index}]", names)
        return self

    def _add(self, turn: Any, where: str, names: str) -> None:
        if not isinstance(turn, dict):
            wanted = "'from' and a text 'value'" if "from" in names else "'role' and a text 'content'"
            who = "; a text alone does not say who speaks" if isinstance(turn, str) else ""
            raise DataError(f"{where}: expected {wanted}, found {turn!r:.80}{who}")
        shared = "from" in turn and "role" not in turn
        said, text = ("from", "value") if shared else ("role", "content")
        if text not in turn and not shared and "value" in turn:
            text = "value"
        elif text not in turn and shared and "content" in turn:
            text = "content"
        elif text not in turn and "parts" in turn:
            text = "parts"
        role, content = turn.get(said), turn.get(text)
        known = _ROLES.get(role.lower()) if isinstance(role, str) else None
        if known is None:
            wanted = ", ".join(_ROLES if shared else ROLES)
            what = f"'from' is {role!r}, not" if shared else f"role {role!r} is not"
            none = "" if said in turn else f"; keys found: {', '.join(map(repr, turn)) or 'none'}"
            raise DataError(f"{where}: {what} one of {wanted}{none}")
        rest = {name: value for name, value in turn.items() if value is not None and name not in (said, text)}
        learned = self._learned(rest, known, where)
        before = len(self.messages)
        if str(role).lower() in _CALLS:
            rest["tool_calls"] = _calls_of_text(content, where, str(role))
            content = None
        self._put(known, content, rest, where, f"'{said}' and a text '{text}'", turn)
        if not learned:
            self.untrained.update(i for i in range(before, len(self.messages)) if self._is_answer(i))

    def _is_answer(self, index: int) -> bool:
        return bool(self.messages[index]["role"] == "assistant")

    def _learned(self, rest: dict[str, Any], role: str, where: str) -> bool:
        """Whether the turn is to be learned; takes the keys that say so out of `rest`."""
        said: dict[str, bool] = {}
        for name in (*_TRAIN, *_MASKED):
            if name in rest:
                value = rest.pop(name)
                if not isinstance(value, (bool, int, float)) or value not in (0, 1):
                    raise DataError(
                        f"{where}: '{name}' is {value!r:.80}; a turn is learned whole (1 or true) or not at all (0 or "
                        "false); remove the key, or round it"
                    )
                said[name] = bool(value) != (name in _MASKED)
        for name in _UNCLEAR:
            if name in rest:
                raise DataError(
                    f"{where}: '{name}' means 'learned' to some libraries and 'not learned' to others; rename it: "
                    "train: true for turns to learn, train: false for others"
                )
        if detail := rest.pop("train_detail", None):
            raise DataError(
                f"{where}: 'train_detail' ({detail!r:.60}) trains parts of a turn, which is not supported; split the "
                "turn, or use train: true or false"
            )
        if unknown := next((name for name, value in rest.items() if _speaks_of_learning(name, value)), None):
            raise DataError(
                f"{where}: '{unknown}' is {rest[unknown]!r:.60}: by its name it says what of the turn is learned, but "
                "it is no key that is read; rename it: train: true for turns to learn, train: false for others"
            )
        if len(set(said.values())) > 1:
            raise DataError(f"{where}: {', '.join(map(repr, said))} contradict each other; keep one of them")
        learned = all(said.values())
        if said and learned and role != "assistant":
            self.notes[f"{next(iter(said))!r} asks to learn a {role} turn; only assistant turns are learned"] = None
        return learned

    def _put(self, role: str, content: Any, rest: dict[str, Any], where: str, wanted: str, turn: Any) -> None:
        """Add a message, or several: results of tools within a user turn are messages of their own."""
        self._refuse_spoken_elsewhere(rest, where)
        if isinstance(content, list):
            content = self._parts(role, content, rest, where)
            if content is None:
                self._note_unread(role, rest)
                return
        if "function_call" in rest:
            if rest.get("tool_calls"):
                raise DataError(f"{where}: has both 'function_call' and 'tool_calls'; keep 'tool_calls'")
            rest["tool_calls"] = [{"type": "function", "function": parsed(rest.pop("function_call"))}]
        calls = parsed(rest.get("tool_calls"))
        if role == "assistant":
            require_text(rest, where)
        for name in TOOLS_OF_TURN:
            if rest.get(name):
                rest[name] = _tools(rest[name], f"{where}: '{name}'")
        if content is None and (calls or any(map(rest.get, REASONING))):
            content = ""
        if not isinstance(content, str):
            raise DataError(f"{where}: expected {wanted}, found {turn!r:.80}")
        if role != "assistant" and calls:
            raise DataError(f"{where}: a {role} turn has 'tool_calls'; only the assistant calls tools")
        if calls is not None and not isinstance(calls, list):
            raise DataError(f"{where}: 'tool_calls': expected a list, found {calls!r:.80}")
        if "tool_calls" in rest and calls is not None:
            rest["tool_calls"] = [_call(call, f"{where}: 'tool_calls'[{i}]") for i, call in enumerate(calls)]
        self._note_unread(role, rest)
        self.messages.append({"role": role, "content": content, **rest})

    def _note_unread(self, role: str, rest: Mapping[str, Any]) -> None:
        for name, value in rest.items():
            read = name in _READ or name in (REASONING if role == "assistant" else ("name",) if role == "tool" else ())
            if not read and value not in ("", [], {}):
                self.notes[f"key '{name}' of a turn is passed to the chat template and not read otherwise"] = None

    @staticmethod
    def _refuse_spoken_elsewhere(rest: dict[str, Any], where: str) -> None:
        for name in _SPOKEN_ELSEWHERE:
            if rest.get(name):
                fix = "move its text to the content" if name == "refusal" else "only text is read: remove the row"
                raise DataError(f"{where}: '{name}' holds a part of what is said, {rest[name]!r:.60}; {fix}")
            rest.pop(name, None)

    def _parts(self, role: str, parts: list[Any], rest: dict[str, Any], where: str) -> str | None:
        """The text of a content in parts, whose calls and thoughts go to `rest`; None if nothing but results is left.

        Raises:
            DataError: a part is neither of these, or in an order that no message has.
        """
        text: list[str] = []
        calls: list[dict[str, Any]] = []
        thoughts: list[str] = []
        results = 0
        for number, part in enumerate(parts):
            place = f"{where}: part {number + 1} of the content"
            part = {"type": "text", "text": part} if isinstance(part, str) else part
            if not isinstance(part, dict):
                raise DataError(f"{place}: expected an object with a 'type', found {part!r:.80}")
            kind = part.get("type", "text" if "text" in part else None)
            if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
                if calls and part["text"].strip():
                    raise DataError(f"{place}: text after a 'tool_use'; a message says its text before its calls")
                text.append(part["text"])
            elif kind in ("thinking", "reasoning") and role == "assistant":
                if calls or any(map(str.strip, text)):
                    raise DataError(f"{place}: '{kind}' after text or a call; a message thinks before it speaks")
                thoughts.append(text_of(part.get("thinking", part.get("reasoning", part.get("text"))), place))
            elif kind == "tool_use" and role == "assistant":
                function = {"name": part.get("name"), "arguments": part.get("input")}
                calls.append({"id": part.get("id"), "type": "function", "function": function})
            elif kind == "tool_result" and role in ("user", "tool"):
                if any(map(str.strip, text)):
                    raise DataError(f"{place}: a 'tool_result' after text; put results first, or in turns of their own")
                self._result(part, place)
                results += 1
            else:
                raise DataError(
                    f"{place} is of type {kind!r}, or not whole; only text, and thinking, tool_use and tool_result in "
                    "the turns that they belong to, are read"
                )
            self._note_rest_of(part)
        if calls:
            rest["tool_calls"] = [*(parsed(rest.get("tool_calls")) or []), *calls]
        if thoughts:
            if rest.get("reasoning_content"):
                raise DataError(f"{where}: has 'reasoning_content' beside parts of the type thinking; keep one of them")
            rest["reasoning_content"] = "".join(thoughts)
        said = "".join(text)
        if not parts and not rest.get("tool_calls"):
            raise DataError(f"{where}: the content is an empty list; expected a text or a list of parts")
        return None if results and not said.strip() else said

    def _result(self, part: Mapping[str, Any], where: str) -> None:
        content = part.get("content")
        message = {"role": "tool", "content": text_of("" if content is None else content, where)}
        if part.get("tool_use_id") is not None:
            message["tool_call_id"] = part["tool_use_id"]
        self.messages.append(message)

    def _note_rest_of(self, part: Mapping[str, Any]) -> None:
        read = ("type", *_TEXT_PARTS, "thinking", "reasoning", "id", "name", "input", "tool_use_id", "content")
        for name, value in part.items():
            if name not in read and value not in (None, "", [], {}, False):
                self.notes[f"key '{name}' of a part of a content is not read"] = None


def _of_columns(value: Any) -> Any:
    """Turns that a table keeps as one list for every key (`datasets` does so), as a list of turns; else the value."""
    columns = list(value.values()) if isinstance(value, dict) and {"role", "from"} & set(value) else []
    if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return value
    return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]


def _speaks_of_learning(name: str, value: Any) -> bool:
    """Whether a key that is not known says what of a turn is learned."""
    lowered = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    said = isinstance(value, (bool, int, float)) or (bool(value) and isinstance(value, (list, dict)))
    return said and bool(_OF_LEARNING.search(lowered))


def _tools(value: Any, where: str) -> list[Any]:
    found = parsed(value)
    tools = [parsed(tool) for tool in found] if isinstance(found, list) else []
    if not tools or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{where}: expected a list of JSON schemas, found {value!r:.60}; or name it in a column 'tools'"
        )
    return tools


def _unpaired(turn: Any) -> list[Any]:
    """The messages of a turn that holds a question and its answer; any other turn itself."""
    if isinstance(turn, dict):
        said = {name: value for name, value in turn.items() if value is not None}
        for asked, answered in PAIRS:
            if {asked, answered} <= set(said) <= {asked, answered, "system"}:
                system = [{"role": "system", "content": said["system"]}] if said.get("system") else []
                user, answer = said[asked], said[answered]
                return [*system, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return [turn]


def _refuse_branches(turns: Sequence[Any], where: str) -> None:
    """Refuse turns that say that they do not follow each other.

    Raises:
        DataError: a turn's parent is another turn of the list than the one before.
    """
    ids = [turn.get("id") if isinstance(turn, dict) else None for turn in turns]
    for index, turn in enumerate(turns):
        parent = next((turn[name] for name in _PARENTS if turn.get(name)), None) if isinstance(turn, dict) else None
        if parent is not None and parent in ids and (index == 0 or parent != ids[index - 1]):
            raise DataError(
                f"{where}[{index}]: the turn answers {parent!r:.60}, not the turn before it: the list is a tree; make "
                "each path from its root to an answer a row of its own"
            )


def parsed(value: Any) -> Any:
    """What JSON text holds, where a table has no better way to hold a list or an object; any other value itself.

    Raises:
        DataError: an object of it has a key twice.
        RecursionError: it is nested too deep.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value, object_pairs_hook=unique)
        except ValueError:
            return value
    return value


def text_of(value: Any, where: str) -> str:
    """A text, or the text of a list of text parts.

    Raises:
        DataError: it is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    raise DataError(f"{where}: expected text, found {value!r:.80}")


def _calls_of_text(content: Any, where: str, role: str) -> list[Any]:
    """The calls of a turn that holds nothing else: JSON of one or of several."""
    found = parsed(content)
    calls: Sequence[Any] = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise DataError(
            f"{where}: a turn of '{role}' holds the JSON of a call, {{'name', 'arguments'}}, or a list of them; "
            f"found {content!r:.80}"
        )
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, as chat templates expect them, not as the text of one."""
    call = parsed(call)
    function = parsed(call.get("function", call)) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: expected {{'function': {{'name', 'arguments'}}}}, found {call!r:.80}")
    if "arguments" not in function and "parameters" in function:  # as Llama 3 writes a call
        function = {"name": function["name"], "arguments": function["parameters"]}
    arguments = parsed(function.get("arguments"))
    function = {**function, "arguments": {} if arguments in (None, "") else arguments}
    if "function" not in call:
        return function
    return {**{name: value for name, value in call.items() if value is not None}, "function": function}
