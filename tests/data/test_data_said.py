"""What cleaned rows say, whatever template they were rendered with."""

from __future__ import annotations

import json
from typing import Any

from gradpursuit.config import SourceSection
from gradpursuit.data import Row, Table
from gradpursuit.data.said import Said


def made(columns: dict[str, Any], file: str = "pool.jsonl") -> Row:
    return Row("a", "0" * 64, file, 1, json.dumps(columns), [1, 2], [-100, 2], file)


def text(columns: dict[str, Any], **more: Any) -> str:
    row = made(columns)
    return Said([], more, Table([row])).text(row)


def test_the_text_of_every_schema_is_its_own_words() -> None:
    assert text({"prompt": "Two?", "completion": "2"}) == "Two?\n2"
    assert text({"instruction": "Add", "input": "1 1", "output": "2"}) == "Add\n\n1 1\n2"
    assert text({"text": "Once upon a time"}) == "Once upon a time"
    assert text({"question": "Two?", "answer": "2"}, prompt="question", completion="answer") == "Two?\n2"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert text({"conversations": turns}) == "Hi\nHello"


def test_reasoning_and_tool_calls_are_said_and_roles_are_not() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "I look it up.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]
    found = text({"messages": messages})
    assert found.split("\n") == ["Be brief.", "Weather?", "", "I look it up.", "weather", "Rome", "sunny", "Sunny."]


def test_columns_of_the_source_that_a_row_came_from() -> None:
    rows = [made({"q": "one", "a": "1"}, "pool.jsonl"), made({"x": "two", "y": "2"}, "target.jsonl")]
    sources = [
        SourceSection(path="pool.jsonl", columns={"prompt": "q", "completion": "a"}),
        SourceSection(path="target.jsonl", columns={"prompt": "x", "completion": "y"}),
    ]
    said = Said(sources, {}, Table(rows[:1]), Table(rows[1:]))
    assert [said.text(row) for row in rows] == ["one\n1", "two\n2"]
