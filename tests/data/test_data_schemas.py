"""Which schema a row has, and what it says; columns by other names."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gradpursuit.data.schemas import Conversation, recognise
from gradpursuit.errors import DataError

QA = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
SYSTEM = {"role": "system", "content": "s"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def found(columns: dict[str, Any], **renamed: str) -> tuple[str, Conversation]:
    return recognise(columns, renamed, "file:7")


def refused(columns: dict[str, Any], **renamed: str) -> str:
    with pytest.raises(DataError) as caught:
        found(columns, **renamed)
    assert str(caught.value).startswith("file:7: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("schema", "columns"),
    [
        ("messages", {"messages": list(QA)}),
        ("messages", {"messages": json.dumps(QA)}),
        ("messages", {"messages": list(QA), "prompt": None, "text": "other"}),
        ("prompt/completion", {"prompt": "q", "completion": "a"}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, QA[1]]}),
        ("prompt/completion", {"prompt": "q", "completion": "a", "messages": None, "instruction": "q"}),
        ("Alpaca", {"instruction": "q", "output": "a"}),
        ("Alpaca", {"instruction": "q", "input": "", "output": "a", "text": "### Instruction: q"}),
        ("Alpaca", {"instruction": "q", "input": None, "output": "a"}),
        ("ShareGPT", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ("ShareGPT", {"conversations": [{"from": "user", "value": "q"}, {"from": "model", "value": "a"}]}),
        ("ShareGPT", {"conversations": list(QA)}),
    ],
)
def test_schemas_of_one_conversation(schema: str, columns: dict[str, Any]) -> None:
    assert found(columns) == (schema, Conversation(QA))


def test_plain_text() -> None:
    assert found({"text": "Once", "label": 1}) == ("text", Conversation(text="Once"))


def test_the_input_of_alpaca_follows_the_instruction() -> None:
    _, said = found({"instruction": "Add.", "input": "1 2", "output": "3", "system": "s"})
    assert said.messages == (SYSTEM, {"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"})


def test_a_system_column_is_used_where_the_conversation_has_none() -> None:
    assert found({"prompt": "q", "completion": "a", "system": "s"})[1].messages == (SYSTEM, *QA)
    own = {"role": "system", "content": "own"}
    assert found({"messages": [own, *QA], "system": "s"})[1].messages == (own, *QA)
    assert found({"prompt": "q", "completion": "a", "system": " "})[1].messages == QA
    lists = {"prompt": [QA[0], QA[1], QA[0]], "completion": [QA[1]], "system": "s"}
    assert found(lists)[1].first == 4
    assert "'system' is int; expected text" in refused({"prompt": "q", "completion": "a", "system": 5})


def test_messages_of_a_prompt_are_context() -> None:
    _, said = found({"prompt": [*QA, QA[0]], "completion": [QA[1]]})
    assert (said.messages, said.first) == ((*QA, *QA), 3)


def test_tools_and_calls() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    messages = [QA[0], {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}]
    _, said = found({"messages": messages, "tools": [tool]})
    assert said.tools == (tool,)
    assert said.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    text = {**CALL, "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages[1]["tool_calls"] = [text]  # type: ignore[assignment]
    assert found({"messages": messages, "tools": json.dumps([tool])}) == ("messages", said)
    assert found({"messages": list(QA), "tools": "[]"})[1].tools == ()
    messages[1]["tool_calls"] = [{"name": "f", "arguments": None}]  # type: ignore[assignment]
    assert found({"messages": messages})[1].messages[1]["tool_calls"] == [{"name": "f", "arguments": {}}]
    messages[1]["tool_calls"] = [{"id": 5}]  # type: ignore[assignment]
    assert "'messages'[1]: 'tool_calls'[0]: expected {'function'" in refused({"messages": messages})
    assert "'tools': expected a list of JSON schemas" in refused({"messages": list(QA), "tools": "none"})


def test_other_keys_of_a_message_stay() -> None:
    message = {"role": "tool", "content": "x", "name": "f", "tool_call_id": "1", "gone": None}
    assert found({"messages": [*QA, message]})[1].messages[2] == {k: v for k, v in message.items() if v is not None}


def test_columns_by_other_names() -> None:
    row = {"question": "q", "answer": "a", "prompt": "not this", "completion": "nor this", "n": 1}
    schema, made = found(row, prompt="question", completion="answer")
    assert (schema, made.messages) == ("prompt/completion", QA)
    unread = "holds text and is not read; put it into the conversation if it belongs there"
    assert made.notes == (f"column 'prompt' {unread}", f"column 'completion' {unread}")
    assert found({"body": "x"}, text="body") == ("text", Conversation(text="x"))
    assert found({"chat": list(QA)}, messages="chat") == ("messages", Conversation(QA))
    assert found({"prompt": "q", "completion": "a", "key": 1}, id="key") == ("prompt/completion", Conversation(QA))
    message = refused({"question": "q"}, prompt="question", completion="answer")
    assert "data.columns takes 'completion' from column 'answer'; columns found: 'question'" in message
    assert "columns found: 'question'; expected" in refused({"question": "q"}, prompt="question")


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"conversations": []}, "'conversations': expected a list of {'from', 'value'} objects"),
        ({"conversations": [{"from": "human"}]}, "'conversations'[0]: expected 'from' and a text 'value'"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "'from' is 'alien', not one of system, human"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "'from' is ['human'], not one of"),
        ({"instruction": "x", "output": ["y"]}, "'output' is list; expected text"),
        ({"instruction": "x", "output": "y", "input": 3}, "'input' is int; expected text"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, "columns found: 'prompt', 'chosen', 'rejected'; expected"),
        ({}, "columns found: none; expected 'messages'"),
    ],
)
def test_other_rows_are_refused(columns: dict[str, Any], part: str) -> None:
    assert part in refused(columns)


def notes(columns: dict[str, Any], **renamed: str | None) -> tuple[str, ...]:
    return recognise(columns, renamed, "file:7")[1].notes  # type: ignore[arg-type]


def test_history_becomes_earlier_turns() -> None:
    turns = tuple({"role": role, "content": text} for role, text in (("user", "h"), ("assistant", "i")))
    pairs: Any = [["h", "i"]]
    for history in (pairs, json.dumps(pairs), list(turns)):
        row = {"instruction": "q", "input": "", "output": "a", "system": "s", "history": history}
        assert found(row) == ("Alpaca", Conversation((SYSTEM, *turns, *QA)))
    assert found({"prompt": "q", "completion": "a", "history": pairs})[1].messages == (*turns, *QA)
    assert (
        found({"q": "q", "r": "a", "past": pairs}, instruction="q", output="r", history="past")[1].messages[:2] == turns
    )
    assert found({"instruction": "q", "output": "a", "history": []})[1].messages == QA
    assert "expected a list of [question, answer] pairs" in refused(
        {"instruction": "q", "output": "a", "history": [["h"]]}
    )
    (note,) = notes({"messages": list(QA), "history": pairs})
    assert "column 'history' holds text and is not read" in note


@pytest.mark.parametrize("name", ["system_prompt", "system_message"])
def test_other_names_of_the_system_turn(name: str) -> None:
    assert found({"messages": list(QA), name: "s"})[1] == Conversation((SYSTEM, *QA))
    mapped = found({"question": "q", "response": "a", name: "s"}, prompt="question", completion="response")
    assert mapped[1] == Conversation((SYSTEM, *QA))
    (note,) = notes({"messages": [SYSTEM, *QA], name: "other"})
    assert note == f"column '{name}' holds text and is not read: the conversation has a system turn already"
    assert notes({"messages": [SYSTEM, *QA], name: "s"}) == ()
    assert recognise({"messages": list(QA), name: "s"}, {"system": None}, "file:7")[1] == Conversation(QA)


@pytest.mark.parametrize(
    "name",
    [
        "context",
        "reasoning",
        "reasoning_content",
        "thinking",
        "thinking_trajectories",
        "documents",
        "Context",
        "images",
    ],
)
def test_columns_that_hold_text_and_are_not_read_are_named(name: str) -> None:
    row = {"prompt": "q", "completion": "a", name: [{"title": "more"}], "source": "web", "category": "x"}
    (note,) = notes(row)
    assert note.startswith(f"column '{name}' holds text and is not read")
    assert notes({"question": "q", "r": "a", name: "x y"}, prompt="question", completion="r")[0] == note
    assert notes({**row, name: None}) == notes({**row, name: " "}) == notes({**row, name: 5}) == ()
    assert notes({**row, name: "q"}) == ()  # what the conversation says already


def test_judgements_are_named() -> None:
    row = {"prompt": "q", "completion": "a"}
    assert "column 'reward' is not read" in notes({**row, "reward": 0.5})[0]
    assert "column 'loss_mask' is not read (by its name it is to say what is learned)" in notes(
        {**row, "loss_mask": [1, 1]}
    )
    assert "'label' is false: the answer is an example of a bad one" in refused({**row, "label": False})
    assert "'kto_tag' is false" in refused({**row, "kto_tag": False})
    assert "column 'mask' is not read" in notes({**row, "mask": "User"})[0]
    assert found({**row, "label": True})[1].messages == QA


def test_a_column_is_switched_off() -> None:
    row = {"messages": list(QA), "tools": [{"name": "f"}], "id": "1"}
    assert recognise(row, {"tools": None}, "file:7") == ("messages", Conversation(QA))
    both = {"messages": list(QA), "prompt": "other", "completion": "one"}
    assert recognise(both, {"messages": None}, "file:7")[0] == "prompt/completion"
    alpaca = {"instruction": "q", "input": "more", "output": "a"}
    assert recognise(alpaca, {"input": None}, "file:7") == ("Alpaca", Conversation(QA))


def test_tools_that_the_system_turn_repeats_are_named() -> None:
    system = {"role": "system", "content": 'Tools: <tools> [{"name": "f"}] </tools>'}
    (note,) = notes({"messages": [system, *QA], "tools": '[{"name": "f"}]'})
    assert "data.columns: {tools: null} leaves the column out" in note
    assert notes({"messages": [SYSTEM, *QA], "tools": '[{"name": "f"}]'}) == ()


def test_forms_of_tools() -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    wrapped = {"type": "function", "function": function}
    assert found({"messages": list(QA), "functions": [function]})[1].tools == (wrapped,)
    assert found({"messages": list(QA), "tools": [{"name": "f", "input_schema": {"type": "object"}}]})[1].tools == (
        wrapped,
    )
    assert found({"messages": list(QA), "tools": [function]})[1].tools == (function,)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "t", "role": "prompter", "message_id": "1", "parent_id": None, "message_tree_id": "1"},
        {"text": "t", "role": "user"},
        {"text": "t", "speaker": "A"},
        {"text": "t", "parent_id": "x"},
        {"content": "t", "role": "user", "conversation_id": 1},
        {"value": "t", "from": "human"},
    ],
)
def test_single_messages_are_no_plain_text(row: dict[str, Any]) -> None:
    message = refused(row)
    assert "the row is one message of" in message
    assert "join the messages to conversations first" in message


def test_text_with_marks_of_turns_is_named() -> None:
    for text in ("<|im_start|>user\nx", "\n\nHuman: x\n\nAssistant: y", "<s>[INST] x [/INST] y", "### Instruction:\nx"):
        (note,) = notes({"text": text})
        assert "marks of chat turns" in note
    assert notes({"text": "A human assistant: once upon a time."}) == ()


@pytest.mark.parametrize(
    ("columns", "renamed", "advice"),
    [
        ({"instruction": "q", "response": "a", "context": "c"}, {"output": "response"}, "no other is looked for"),
        (
            {"instruction": "q", "response": "a", "context": "c"},
            {"output": "response"},
            "{instruction: instruction, input: context, output: response}",
        ),
        ({"instruction": "q", "output": None}, {}, "'output' is null, so the row lacks a part"),
        ({"conversation": [QA[0]]}, {}, "'conversation' holds turns: data.columns: {messages: conversation}"),
        ({"data": ["a", "b"]}, {}, "'data' is a list of texts: make it a column messages"),
        ({"system": "s", "chat": "USER: a\n\nASSISTANT: b"}, {}, "'chat' is one text with marks of turns"),
        ({"query": "q", "answers": "a"}, {}, "{prompt: query, completion: answers}"),
        ({"inputs": "q", "targets": "a"}, {}, "{prompt: inputs, completion: targets}"),
        ({"prompt": "x", "chosen": "a", "rejected": "b"}, {}, "data.columns: {prompt: prompt, completion: chosen}"),
        ({"prompt": "x", "chosen": list(QA), "rejected": list(QA)}, {}, "data.columns: {messages: chosen}"),
        ({"Question": "q", "Response": "a"}, {}, "{prompt: Question, completion: Response}"),
        ({"instruction": "i", "chosen": "a", "rejected": "b"}, {}, "{instruction: instruction, output: chosen}"),
        ({"chosen": "\n\nHuman: a", "rejected": "b"}, {}, "'chosen' is one text with marks of turns"),
    ],
)
def test_advice_can_be_followed(columns: dict[str, Any], renamed: dict[str, str], advice: str) -> None:
    assert advice in refused(columns, **renamed)


def test_text_that_is_odd_json_in_a_column_that_is_not_read() -> None:
    for odd in ('{"a": 1, "a": 2}', "[" * 5000, "{no json"):
        (note,) = notes({"prompt": "q", "completion": "a", "context": odd})
        assert "column 'context'" in note


@pytest.mark.parametrize(
    "columns", [{"loss_mask": [0, 1]}, {"train": False}, {"weights": [1, 0.0]}, {"trainable": 0}, {"masks": "[0, 1]"}]
)
def test_a_column_that_excludes_a_part_of_the_row_is_refused(columns: dict[str, Any]) -> None:
    assert "put train: false into such turns" in refused({"messages": list(QA), **columns})


@pytest.mark.parametrize(
    "name",
    [
        "title",
        "ctxs",
        "facts",
        "steps",
        "apis",
        "headline",
        "summary",
        "choices",
        "options",
        "systemInstruction",
        "target",
    ],
)
def test_more_columns_that_may_belong_to_the_row_are_named(name: str) -> None:
    for row in ({"text": "Once"}, {"prompt": "q", "completion": "a"}):
        assert f"column '{name}' holds text and is not read" in notes({**row, name: ["A word"]})[0]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("q", [QA[1]]), ([QA[0]], "a"), (json.dumps([QA[0]]), json.dumps([QA[1]])), (QA[0], QA[1])],
)
def test_a_prompt_and_a_completion_of_two_kinds(prompt: Any, completion: Any) -> None:
    assert found({"prompt": prompt, "completion": completion}) == ("prompt/completion", Conversation(QA, first=1))
    assert found({"prompt": '{"a": 1}', "completion": [QA[1]]})[1].messages[0]["content"] == '{"a": 1}'


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"contents": [{"role": "user", "parts": [{"text": "q"}]}]}, "data.columns: {messages: contents}"),
        ({"conversation": [{"human": "q", "assistant": "a"}]}, "data.columns: {messages: conversation}"),
        ({"conversation": [{"system": "s", "input": "q", "output": "a"}]}, "data.columns: {messages: conversation}"),
        ({"prompt": {"text": "q", "replies": []}, "message_tree_id": "1"}, "'prompt' holds a tree of messages"),
        ({"data": [{"prompt": "q", "completion": "a"}]}, "'data' is a list of objects: if these are the rows"),
        ({"messages": str(list(QA))}, "write it with json.dumps"),
        ({"mapping": {"1": {"message": {}, "children": []}}}, "'mapping' holds a tree of messages"),
    ],
)
def test_other_forms_of_conversations_are_named(columns: dict[str, Any], part: str) -> None:
    assert part in refused(columns)


@pytest.mark.parametrize("tools", ["", " ", "null", "None", "[]", "{}", [], {}])
def test_no_tools_however_a_table_says_so(tools: Any) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "tools": tools}
    assert (recognise(row, {}, "f:1")[1].tools, recognise(row, {}, "f:1")[1].notes) == ((), ())


@pytest.mark.parametrize("name", ["chat_template_kwargs", "enable_thinking", "reasoning_effort", "tool_choice"])
def test_columns_for_the_chat_template_are_noted(name: str) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], name: "none"}
    (note,) = recognise(row, {}, "f:1")[1].notes
    assert note.startswith(f"column '{name}' is for the chat template and is not read; data.chat_template_kwargs")


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"input": [{"role": "user", "content": "q"}], "output": "a"}, "{prompt: input, completion: output}"),
        ({"system": "s", "question": "q", "chosen": "c", "rejected": "r"}, "{prompt: question, completion: chosen}"),
        ({"query": "q", "answers": '[{"name": "f"}]', "tools": "[]"}, "{prompt: query, completion: answers}"),
    ],
)
def test_advice_that_loses_no_answer(row: dict[str, Any], mapping: str) -> None:
    with pytest.raises(DataError) as error:
        recognise(row, {}, "f:1")
    assert str(error.value).endswith(mapping)
