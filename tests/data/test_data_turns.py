"""Turns in the forms of other libraries: read whole, refused, or noted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gradpursuit.data.schemas import Conversation, recognise
from gradpursuit.errors import DataError

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def read(*turns: Any) -> Conversation:
    column = "conversations" if any("from" in turn for turn in turns if isinstance(turn, dict)) else "messages"
    return recognise({column: list(turns)}, {}, "file:7")[1]


def refused(*turns: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*turns)
    return str(caught.value)


def shared(message: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The turn in ShareGPT's form."""
    return {"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": message["content"], **more}


@pytest.mark.parametrize(
    "key",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"trainable": False},
        {"do_train": False},
        {"loss": False},
        {"loss_mask": 0},
        {"loss_scale": 0.0},
        {"include_in_loss": False},
        {"with_loss": False},
        {"learnable": False},
        {"no_loss": True},
        {"do_not_train": True},
        {"masked": True},
        {"weight": 0, "train": False},
    ],
)
def test_turns_that_are_not_to_be_learned(key: dict[str, Any]) -> None:
    wanted = Conversation((USER, ANSWER, USER, ANSWER), untrained=frozenset({1}))
    assert read(USER, {**ANSWER, **key}, USER, ANSWER) == wanted
    assert read(shared(USER), shared(ANSWER, **key), shared(USER), shared(ANSWER)) == wanted
    other = {name: not value for name, value in key.items()}
    assert read(USER, {**ANSWER, **other}) == read(USER, {**ANSWER, "weight": None}) == Conversation((USER, ANSWER))


def test_positions_count_the_messages_that_are_made() -> None:
    row = {"prompt": [USER, {**ANSWER, "weight": 0}, USER], "completion": [{**ANSWER, "weight": 0}], "system": "s"}
    assert recognise(row, {}, "file:7")[1].untrained == frozenset({2, 4})
    assert read(USER, {**ANSWER, "weight": 0}).folded() != read(USER, ANSWER).folded()


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ({"weight": 0.5}, "'weight' is 0.5; a turn is learned whole (1 or true) or not at all"),
        ({"weight": "0"}, "'weight' is '0'"),
        ({"weight": float("nan")}, "'weight' is nan"),
        ({"train": "no"}, "'train' is 'no'"),
        ({"mask": 1}, "'mask' means 'learned' to some libraries"),
        ({"weight": 1, "train": False}, "'weight', 'train' contradict each other"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]}, "trains parts of a turn"),
        ({"loss_masked": True}, "'loss_masked' is True: by its name it says what of the turn is learned"),
        ({"isLoss": 0}, "'isLoss' is 0: by its name"),
        ({"no_train": True}, "'no_train' is True: by its name"),
        ({"Weight": 0}, "'Weight' is 0: by its name"),
        ({"training_detail": [{"begin_offset": 0}]}, "'training_detail' is [{'begin_offset': 0}]: by its name"),
        ({"reasoning": {"content": "hm"}}, "'reasoning' is dict, {'content': 'hm'}; expected the reasoning as text"),
        ({"thinking": ["hm"]}, "'thinking' is list, ['hm']; expected the reasoning as text"),
        ({"reasoning_details": {"text": "hm"}}, "'reasoning_details' is dict, {'text': 'hm'}; expected the reasoning"),
        ({"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}, "[0] holds reasoning that is no text"),
        ({"thinking_blocks": [{"type": "redacted_thinking", "data": "x"}]}, "'thinking_blocks'[0] holds reasoning"),
        ({"thinking_blocks": [{"thinking": "a"}], "reasoning": "b"}, "other reasoning than 'reasoning'; keep one"),
        ({"tools": "calculator"}, "'tools': expected a list of JSON schemas, found 'calculator'"),
        ({"functions": ["f"]}, "'functions': expected a list of JSON schemas, found ['f']"),
    ],
)
def test_marks_that_cannot_be_kept_are_refused(key: dict[str, Any], part: str) -> None:
    assert part in refused(USER, {**ANSWER, **key})
    assert part in refused(shared(USER), shared(ANSWER, **key))


def test_a_user_turn_that_asks_to_be_learned_is_noted() -> None:
    assert read({**USER, "train": True}, ANSWER).notes == (
        "'train' asks to learn a user turn; only assistant turns are learned",
    )
    assert read({**USER, "weight": 0}, ANSWER) == Conversation((USER, ANSWER))


def test_calls_of_functions() -> None:
    tool = {"role": "tool", "content": "1"}
    wanted = (USER, CALLING, tool, ANSWER)
    text = json.dumps(CALL["function"])
    observed = {"from": "observation", "value": "1"}
    for call in (text, f"[{text}]", json.dumps({"name": "f", "arguments": '{"x": 1}'})):
        assert read(shared(USER), {"from": "function_call", "value": call}, observed, shared(ANSWER)).messages == wanted
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    assert read(USER, legacy, {"role": "function", "name": "f", "content": "1"}, ANSWER).messages == (
        USER,
        CALLING,
        {**tool, "name": "f"},
        ANSWER,
    )
    llama = {"name": "f", "parameters": {"x": 1}}
    assert read(USER, {**CALLING, "tool_calls": [llama]}).messages[1]["tool_calls"] == [CALL["function"]]
    assert "a turn of 'function_call' holds the JSON of a call" in refused({"from": "function_call", "value": "f(1)"})
    assert "has both 'function_call' and 'tool_calls'" in refused({**legacy, "tool_calls": [CALL]})
    assert "a user turn has 'tool_calls'" in refused({**USER, "tool_calls": [CALL]})


def test_contents_in_parts() -> None:
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "Let me"},
        {"type": "text", "text": " look."},
        {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
    ]
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "7"}]}
    found = read(
        USER,
        {"role": "assistant", "content": parts},
        {"role": "user", "content": [result, {"type": "text", "text": "so?"}]},
    )
    assert found.messages == (
        USER,
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "1", **CALL}],
        },
        {"role": "tool", "content": "7", "tool_call_id": "1"},
        {"role": "user", "content": "so?"},
    )
    assert found.notes == ()
    alone = read(USER, {"role": "user", "content": [result]}, ANSWER)
    assert [message["role"] for message in alone.messages] == ["user", "tool", "assistant"]
    cited = {"role": "user", "content": [{"type": "text", "text": "x", "citations": ["y"]}]}
    assert read(cited, ANSWER).notes == ("key 'citations' of a part of a content is not read",)


@pytest.mark.parametrize(
    ("turn", "part"),
    [
        ({"role": "user", "content": [{"type": "image", "image": "x"}]}, "part 1 of the content is of type 'image'"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "input_audio"}]},
            "part 2 of the content",
        ),
        ({"role": "user", "content": []}, "the content is an empty list"),
        ({"role": "user", "content": [5]}, "expected an object with a 'type'"),
        (
            {"role": "assistant", "content": [{"type": "tool_use", "name": "f"}, {"type": "text", "text": "x"}]},
            "text after a 'tool_use'",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "tool_result", "content": "y"}]},
            "a 'tool_result' after text",
        ),
        ({"role": "assistant", "content": None, "refusal": "No."}, "'refusal' holds a part of what is said, 'No.'"),
        ({**ANSWER, "audio": {"id": "x"}}, "'audio' holds a part of what is said"),
        ({**USER, "images": ["x.png"]}, "'images' holds a part of what is said"),
        ("text alone", "expected 'role' and a text 'content'"),
        ({"content": "x"}, "role None is not one of system, developer, user, assistant, tool; keys found: 'content'"),
    ],
)
def test_what_is_said_in_a_form_that_is_not_read_is_refused(turn: Any, part: str) -> None:
    assert part in refused(turn)


def test_keys_that_are_not_read_are_noted() -> None:
    found = read({**USER, "name": "Bob", "toxic": False, "gone": None, "refusal": None}, {**ANSWER, "audio": None})
    assert found.messages == ({**USER, "name": "Bob", "toxic": False}, ANSWER)
    said = "of a turn is passed to the chat template and not read otherwise"
    assert found.notes == (f"key 'name' {said}", f"key 'toxic' {said}")
    more = read(shared(USER), shared(ANSWER, mood="x", reasoning_content="hm"))
    assert more.messages[1] == {**ANSWER, "mood": "x", "reasoning_content": "hm"}
    assert more.notes == (f"key 'mood' {said}",)


def test_names_of_roles() -> None:
    for user, assistant in (("human", "gpt"), ("user", "model"), ("human", "ai"), ("prompter", "assistant")):
        turns = [{"role": user, "content": "q"}, {"role": assistant, "content": "a"}]
        assert recognise({"messages": turns}, {}, "file:7")[1] == Conversation((USER, ANSWER))


def test_a_key_that_json_text_has_twice_is_refused() -> None:
    assert "the key 'x' is there twice" in refused({"from": "function_call", "value": '{"name": "f", "x": 1, "x": 2}'})


def test_pairs_of_turns_and_parts() -> None:
    assert read({"human": "q", "assistant": "a"}, {"user": "q", "assistant": "a"}).messages == (USER, ANSWER) * 2
    first = {"input": "q", "output": "a", "system": "s"}
    assert read(first, {"input": "q", "output": "a"}).messages == (
        {"role": "system", "content": "s"},
        *(USER, ANSWER) * 2,
    )
    assert read({"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": ["a"]}).messages == (
        USER,
        ANSWER,
    )
    assert "keys found: 'human', 'assistant', 'Commands'" in refused({"human": "q", "assistant": "a", "Commands": "x"})
    assert "part 1 of the content" in refused({"role": "model", "parts": [{"functionCall": {"name": "f"}}]})


def test_a_tree_within_a_list_of_turns_is_refused() -> None:
    linear = [{**USER, "id": "1", "parent": None}, {**ANSWER, "id": "2", "parent": "1"}]
    assert len(read(*linear).messages) == 2
    assert "answers '1', not the turn before it" in refused(*linear, {**ANSWER, "id": "3", "parent": "1"})


def test_keys_that_only_sound_like_the_mask_are_noted() -> None:
    assert read(USER, {**ANSWER, "training_source": "web", "brain": 0, "lossless": True}).notes == tuple(
        f"key '{name}' of a turn is passed to the chat template and not read otherwise"
        for name in ("training_source", "brain", "lossless")
    )


def test_reasoning_of_a_user_turn_is_noted() -> None:
    note = "key 'reasoning_content' of a turn is passed to the chat template and not read otherwise"
    assert read({**USER, "reasoning_content": "hm"}, ANSWER).notes == (note,)
    assert read(USER, {**ANSWER, "reasoning_content": "hm"}).notes == ()


@pytest.mark.parametrize(
    ("key", "blocks"),
    [
        ("reasoning_details", [{"type": "reasoning.text", "text": "so "}, {"summary": "so"}]),
        ("thinking_blocks", [{"type": "thinking", "thinking": "so so", "signature": "x"}]),
    ],
)  # fmt: skip
def test_reasoning_in_blocks_is_its_text(key: str, blocks: list[dict[str, str]]) -> None:
    wanted = {**ANSWER, "reasoning_content": "so so"}
    for value in (blocks, json.dumps(blocks)):
        assert read(USER, {**ANSWER, key: value}).messages[1] == wanted
        assert read(USER, {**ANSWER, key: value, "reasoning_content": " so  so"}).messages[1] == {
            **ANSWER,
            "reasoning_content": " so  so",
        }
        assert read(USER, {**ANSWER, "content": None, key: value}).messages[1] == {**wanted, "content": ""}
    assert read(USER, {**ANSWER, key: "so so"}).messages[1] == wanted
    assert read(USER, {**ANSWER, key: []}).notes == ()


def test_turns_that_a_table_keeps_by_column() -> None:
    for asks, says, columns in (("user", "assistant", ("role", "content")), ("human", "gpt", ("from", "value"))):
        row = {"messages": dict(zip(columns, (["system", asks, says], ["s", "q", "a"]), strict=True))}
        made = recognise(row, {}, "file:7")[1].messages
        assert [tuple(turn.values()) for turn in made] == [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert "expected a list of" in refused_row({"messages": {"role": ["user"], "content": ["q", "a"]}})
    assert "expected a list of" in refused_row({"messages": {"role": "user", "content": "q"}})
    assert "a text alone does not say who speaks" in refused_row({"messages": ["q", "a"]})


def refused_row(row: dict[str, Any]) -> str:
    with pytest.raises(DataError) as error:
        recognise(row, {}, "file:7")
    return str(error.value)
