"""Columns beside those that a schema reads: what is refused because of them, and what is noted.

A column that may belong to what is said (a system prompt, reasoning, documents) and is not read must not be lost in
silence: it is named, by a note of the conversation, which `inspect` and the run's log show. Columns that make a row
something else than an example to learn (one message of a tree, an answer that is marked as bad, a pair of which one is
rejected) refuse it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from gradpursuit.data.turns import PAIRS, Message, parsed
from gradpursuit.errors import DataError

_SPOKEN = re.compile(
    r"(?:^|_)(?:histor(?:y|ies)|system|sys|contexts?|background|documents?|docs|passages?|paragraphs?|evidences?|"
    r"knowledge|reason(?:ing|s)?|think(?:ing)?|thoughts?|rationales?|explanations?|cot|chain_of_thought|scratchpad|"
    r"trace|persona|developer|preamble|article|examples?|demonstrations?|few_?shots?|prefix|suffix|functions?|tools?|"
    r"images?|audios?|videos?|chosen|rejected|input|messages?|conversations?|prompt|completion|output|instructions?|"
    r"response|answer|dialog(?:ue)?|turns|title|subtitle|headline|heading|subject|summary|abstract|tldr|choices?|"
    r"options?|hints?|captions?|questions?|query|solutions?|targets?|translations?|explanation|critique|feedback|"
    r"schema|table|replies|facts?|references?|source_text|chunks?|retrieved|retrieval|ctxs?|content|body|story|post|"
    r"comments?|description|scenario|character|profile|constraints?|plan|steps|reflections?|analysis|monologue|"
    r"attachments?|apis?|starter_code|equations?)(?:_|$)|_?(?:images?|audios?|videos?)$"
)
_OF_THE_MASK = (
    "weight", "train", "trainable", "loss_mask", "loss_masks", "mask", "masks", "loss_weight", "masked", "weights",
    "labels", "train_on_input", "train_on_inputs",
)  # fmt: skip
# Of these a 0 or false says that the row, or a turn of it, is not to be learned.
_TRAINED = ("train", "trainable", "loss_mask", "loss_masks", "loss_weight", "weights", "mask", "masks")
_VALUED = ("reward", "rewards", "score", "scores", "rating", "is_correct", "correct", "label", *_OF_THE_MASK)
_OF_THE_TEMPLATE = (
    "chat_template_kwargs", "chat_template", "enable_thinking", "thinking_mode", "reasoning_effort", "tool_choice",
    "add_generation_prompt", "continue_final_message",
)  # fmt: skip
_NAMES = ("id", "ids", "name", "names", "type", "types", "tokens", "length", "len", "count", "num", "lang", "language")
_AUTHOR = ("role", "from", "speaker", "sender")
_ONE_OF_A_TREE = ("parent_id", "message_tree_id", "parent_message_id")
_TURN_MARKS = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|assistant|system)\|>|\[/?INST\]|<｜(?:User|Assistant)｜>|"
    r"^###? ?(?:Instruction|Human|User|Assistant|Response)\b|^(?:Human|Assistant|USER|ASSISTANT|User): ?",
    re.MULTILINE,
)
_TALKS = ("chat", "chosen", "data", "dialogue", "dialog", "turns", "conversation", "utterances")
_ASKED = ("prompt", "question", "query", "instruction", "inputs", "input", "problem", "inputs_pretokenized", "human")
_ANSWERED = (
    "completion", "response", "answer", "answers", "output", "outputs", "targets", "target", "solution",
    "targets_pretokenized", "generation", "reply", "chosen", "gpt",
)  # fmt: skip


def refuse_what_is_no_example(columns: Mapping[str, Any], schema: str, where: str) -> None:
    """Refuse a row of a schema that its other columns say is no example to learn.

    Raises:
        DataError: with what to do.
    """
    if schema == "text":
        _refuse_one_message(columns, where)
    _refuse_untrained(columns, where)
    marked = next((name for name in ("label", "kto_tag") if columns.get(name) is False), None)
    if marked and schema != "text":
        raise DataError(
            f"{where}: '{marked}' is false: the answer is an example of a bad one (as in KTO data), not one to "
            "learn; remove such rows"
        )


def _refuse_untrained(columns: Mapping[str, Any], where: str) -> None:
    for name in _TRAINED:
        value = parsed(columns.get(name))
        marks = value if isinstance(value, list) else [value]
        if any(isinstance(mark, (bool, int, float)) and mark == 0 for mark in marks):
            raise DataError(
                f"{where}: column '{name}' is {value!r:.60}: by its name it says that a part of the row is not to be "
                "learned, which only the turns themselves can say: put train: false into such turns, remove rows of "
                "which nothing is to be learned, and remove or rename the column"
            )


def unknown(columns: Mapping[str, Any], renamed: Mapping[Any, str | None], schemas: str, where: str) -> DataError:
    """Why the columns of a row are no known schema, and what to do."""
    listed = ", ".join(f"'{name}'{'' if value is not None else ' (null)'}" for name, value in columns.items()) or "none"
    found = f"{where}: columns found: {listed}; expected {schemas}"
    if not columns:
        return DataError(found)
    if any(columns.get(name) is not None for name in ("content", "text", "value", "message")):
        try:
            _refuse_one_message(columns, where)
        except DataError as error:
            return error
    if tree := next((name for name, value in columns.items() if _branches(value)), None):
        return DataError(
            f"{where}: column '{tree}' holds a tree of messages; make each path from its root to an answer a row of "
            "its own, as a column messages: [{role: user, content: ...}, {role: assistant, content: ...}]"
        )
    mapped = {ours: theirs for ours, theirs in renamed.items() if theirs is not None and ours != "id"}
    if not mapped:
        return DataError(f"{found}{_advice(columns)}")
    return DataError(
        f"{found}; data.columns maps {_as_mapping(mapped)}, and with one column of a schema mapped no other is looked "
        f"for by its own name: map all of them, as in {_as_mapping(_completed(mapped, columns))}"
    )


def notes(
    columns: Mapping[str, Any],
    read: Collection[str],
    off: Collection[str],
    said: Sequence[Message],
    text: str | None,
) -> Iterator[str]:
    """What the columns hold that is not read, one sentence each.

    Args:
        columns: of the row.
        read: names of those that were read.
        off: names that `data.columns` switches off.
        said: messages that were made of the row.
        text: its plain text.
    """
    spoken = "\n".join([text or "", *(str(value) for message in said for value in message.values())])
    for name, value in columns.items():
        if name in read or name in off:
            continue
        lowered = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        if lowered in _VALUED and not (lowered == "label" and text is not None) and value not in (None, "", []):
            what = "is to say what is learned" if lowered in _OF_THE_MASK else "is a judgement of the row"
            yield f"column '{name}' is not read (by its name it {what})"
        elif lowered in _OF_THE_TEMPLATE and value not in (None, "", [], {}):
            yield (
                f"column '{name}' is for the chat template and is not read; data.chat_template_kwargs gives it "
                "variables that are the same for every row"
            )
        elif _is_spoken(lowered) and any(part not in spoken for part in _texts(value)):
            yield f"column '{name}' holds text and is not read{_advice_on(name, said)}"
    if text is not None and _TURN_MARKS.search(text):
        yield (
            "'text' holds marks of chat turns and is read as plain text, all of it supervised, also what the user "
            "says; for answers alone make it a 'messages' column"
        )


def _refuse_one_message(columns: Mapping[str, Any], where: str) -> None:
    author = next((name for name in _AUTHOR if isinstance(columns.get(name), str)), None)
    tree = next((name for name in _ONE_OF_A_TREE if name in columns), None)
    if author is None and tree is None:
        return
    named = ", ".join(f"'{name}'" for name in (author, tree) if name is not None)
    kind = "a tree" if tree else "a conversation"
    how = "each from its root down to an answer, " if tree else ""
    raise DataError(
        f"{where}: {named} say{'' if author and tree else 's'} that the row is one message of {kind}; join the "
        f"messages to conversations first, {how}as a column messages: [{{role: user, content: ...}}, {{role: "
        "assistant, content: ...}]"
    )


def _is_spoken(name: str) -> bool:
    """Whether a column of this name may belong to what is said."""
    return bool(_SPOKEN.search(name)) and name.rpartition("_")[2] not in _NAMES


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value that says something."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        with suppress(DataError, RecursionError):  # of a column that is not read; its text serves as well
            item = parsed(item)
        if isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, bytes) and item:
            yield repr(item)
        elif isinstance(item, str) and item.strip():
            yield item.strip()


def _advice_on(name: str, said: Sequence[Message]) -> str:
    if not name.lower().startswith("sys"):
        return "; put it into the conversation if it belongs there"
    if not said:
        return ": plain text has no system turn"
    if said[0]["role"] in ("system", "developer"):
        return ": the conversation has a system turn already"
    return f"; data.columns: {{system: {name}}} reads it"


def _advice(columns: Mapping[str, Any]) -> str:
    """How the columns could be mapped."""
    if columns.get("chosen") is not None and columns.get("rejected") is not None:
        if "instruction" in columns and isinstance(columns["chosen"], str):
            alpaca = {"instruction": "instruction", **({"input": "input"} if "input" in columns else {})}
            return f"; these are pairs of answers: data.columns: {_as_mapping({**alpaca, 'output': 'chosen'})}"
        whole = isinstance(columns["chosen"], list) and not isinstance(columns.get("prompt"), list)
        asked = _first(_ASKED, columns)
        if whole or asked:
            chosen = {"messages": "chosen"} if whole else {"prompt": str(asked), "completion": "chosen"}
            advice = "these are pairs of answers: to learn the chosen one alone, data.columns"
            return f"; {advice}: {_as_mapping(chosen)}"
    firsts = {
        name: next(iter(found), None) for name, value in columns.items() if isinstance(found := parsed(value), list)
    }
    talks = [name for name, first in firsts.items() if isinstance(first, Mapping) and _is_turn(first)]
    asked, answered = _first(_ASKED, columns), _first(_ANSWERED, columns)
    if len(talks) == 1 and not (talks[0] == asked and answered):
        return f"; '{talks[0]}' holds turns: data.columns: {_as_mapping({'messages': talks[0]})}"
    rows = [name for name, first in firsts.items() if isinstance(first, Mapping) and not talks]
    if rows and not (asked and answered):
        return f"; '{rows[0]}' is a list of objects: if these are the rows, save that list as the whole file"
    if strings := [name for name, first in firsts.items() if name in _TALKS and isinstance(first, str)]:
        return f"; '{strings[0]}' is a list of texts: make it a column messages, {{role, content}} each"
    if texts := [name for name in _TALKS if isinstance(columns.get(name), str)]:
        marks = " with marks of turns" if _TURN_MARKS.search(columns[texts[0]]) else ""
        return f"; '{texts[0]}' is one text{marks}: split it into a column messages, {{role, content}} each"
    mapping = {"prompt": asked or "question", "completion": answered or "answer"}
    if asked == "instruction" and answered and columns.get("context"):
        mapping = {"instruction": asked, "input": "context", "output": answered}
    empty = next((name for name in (asked, answered) if name and columns.get(name) is None), None)
    if empty:
        return f"; '{empty}' is null, so the row lacks a part: remove the row, or fill it"
    return f"; name the columns in data.columns, as in {_as_mapping(mapping)}"


def _completed(mapped: Mapping[Any, str], columns: Mapping[str, Any]) -> dict[str, str]:
    """The mapping of the user, with the columns that its schema lacks."""
    needed = ("instruction", "output") if {"instruction", "input", "output"} & set(mapped) else ("prompt", "completion")
    if {"messages", "conversations", "text"} & set(mapped):
        return dict(mapped)
    guess = {needed[0]: _first(_ASKED, columns) or "question", needed[1]: _first(_ANSWERED, columns) or "answer"}
    if needed[0] == "instruction" and "context" in columns:
        guess["input"] = "context"
    return {**{ours: theirs for ours, theirs in guess.items() if ours not in mapped}, **mapped}


def _branches(value: Any) -> bool:
    """Whether it is a message with its answers in it, or several such."""
    first = next(iter(value.values()), None) if isinstance(value, Mapping) else None
    return any(isinstance(item, Mapping) and {"replies", "children"} & set(item) for item in (value, first))


def _is_turn(value: Mapping[str, Any]) -> bool:
    if any(set(pair) <= set(value) for pair in PAIRS):
        return True
    return bool({"role", "from"} & set(value)) and bool({"content", "value", "parts"} & set(value))


def _first(names: Iterable[str], columns: Mapping[str, Any]) -> str | None:
    theirs = {name.lower(): name for name in columns}
    return next((theirs[name] for name in names if name in theirs), None)


def _as_mapping(mapping: Mapping[Any, str]) -> str:
    return "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in mapping.items()) + "}"
