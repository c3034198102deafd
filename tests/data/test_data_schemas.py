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
        ("prompt/completion", {"prompt": "q", "completion": "a", "messages": None, "instruction": "x"}),
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
    assert found(row, prompt="question", completion="answer") == ("prompt/completion", Conversation(QA))
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
