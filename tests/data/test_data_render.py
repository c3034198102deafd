"""Supervised tokens are exactly the assistant's text and its end token, in every template that can be trusted."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from gradpursuit.data import IGNORE, Conversation, Rendered, Renderer
from gradpursuit.errors import DataError, ModelError

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END_TOKEN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path)


def with_template(tokenizer: Any, template: str | None, *special: str) -> Any:
    """A copy of the tokenizer with another template, and with the special tokens that it uses."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens(list(special), special_tokens=True)
    other.chat_template = template
    return other


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Alternating user and assistant turns."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def supervised_runs(tokenizer: Any, rendered: Rendered) -> list[str]:
    """The text of every unbroken run of supervised tokens."""
    runs: list[list[int]] = []
    previous = False
    for token, label in zip(rendered.input_ids, rendered.labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            if not previous:
                runs.append([])
            runs[-1].append(token)
        previous = label != IGNORE
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    "answer",
    [
        "Four.",
        "Four",
        "ünïcödé – 数学 🧮👩‍👩‍👧 ok",
        "👋",
        "two\n\nparagraphs\n\n\n  indented\n",
        " leading space",
        "trailing space ",
        " both ",
        "tab\tand nbsp\u00a0",
        "What is 2+2?",
        "<|im_end|> user\nWhat is 2+2?",
        "assistant",
        "<|im_start|>assistant\nnested",
        "def f(x):\n    return x  # 2+2\n",
        "0" * 300,
    ],
)
def test_assistant_text_and_end_token_are_supervised(tokenizer: Any, answer: str) -> None:
    rendered = Renderer(tokenizer)(turns("What is 2+2?", answer))
    assert supervised_runs(tokenizer, rendered) == [answer + "<|im_end|>"]
    assert rendered.supervised == sum(label != IGNORE for label in rendered.labels)
    whole = tokenizer.decode(rendered.input_ids)
    assert whole == tokenizer.apply_chat_template(turns("What is 2+2?", answer), tokenize=False)


def test_tokens_are_those_of_the_whole_text(tokenizer: Any) -> None:
    messages = turns("Hi", "Hello!", "Bye", "Goodbye 👋", system="Be kind.")
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert Renderer(tokenizer)(messages).input_ids == expected


def test_every_assistant_turn_is_supervised(tokenizer: Any) -> None:
    rendered = Renderer(tokenizer)(turns("a", "one", "b", "two\n", "c", "three"))
    assert supervised_runs(tokenizer, rendered) == ["one<|im_end|>", "two\n<|im_end|>", "three<|im_end|>"]


def test_last_turn_of_the_user_and_no_turn_of_the_assistant(tokenizer: Any) -> None:
    assert supervised_runs(tokenizer, Renderer(tokenizer)(turns("a", "one", "b"))) == ["one<|im_end|>"]
    rendered = Renderer(tokenizer)(turns("a"))
    assert rendered.supervised == 0
    assert set(rendered.labels) == {IGNORE}


@pytest.mark.parametrize("system", ["You are terse.", "one", "What? one"])
def test_system_message_is_not_supervised(tokenizer: Any, system: str) -> None:
    rendered = Renderer(tokenizer)(turns("What?", "one", system=system))
    assert supervised_runs(tokenizer, rendered) == ["one<|im_end|>"]
    assert tokenizer.decode(rendered.input_ids).startswith(f"<|im_start|>system\n{system}<|im_end|>")


@pytest.mark.parametrize("empty", ["", " \n"])
def test_empty_answers_are_rendered_but_not_learned(tokenizer: Any, empty: str) -> None:
    alone = Renderer(tokenizer)(turns("a", empty))
    assert alone.supervised == 0
    assert tokenizer.decode(alone.input_ids).endswith(f"assistant\n{empty}<|im_end|>\n")
    assert supervised_runs(tokenizer, Renderer(tokenizer)(turns("a", "one", "b", empty, "c", "two"))) == [
        "one<|im_end|>",
        "two<|im_end|>",
    ]
    assert Renderer(tokenizer, "last-turn")(turns("a", "one", "b", empty)).supervised == 0


def test_modes(tokenizer: Any) -> None:
    messages = turns("a", "one", "b", "two", "c", system="s")
    assert supervised_runs(tokenizer, Renderer(tokenizer, "last-turn")(messages)) == ["two<|im_end|>"]
    full = Renderer(tokenizer, "full")(messages)
    assert full.labels == full.input_ids == Renderer(tokenizer)(messages).input_ids
    assert full.supervised == len(full.input_ids) - 1


def test_answers_in_a_prompt_are_context(tokenizer: Any) -> None:
    conversation = Conversation(tuple(turns("a", "one", "b", "two")), first=3)
    (rendered,) = Renderer(tokenizer).many([conversation])
    assert isinstance(rendered, Rendered)
    assert supervised_runs(tokenizer, rendered) == ["two<|im_end|>"]


def test_plain_text_is_supervised_whole_without_a_template(tokenizer: Any) -> None:
    for turns_ in ("assistant", "last-turn", "full"):
        (rendered,) = Renderer(tokenizer, turns_).many([Conversation(text="Once upon a time 👋")])
        assert isinstance(rendered, Rendered)
        assert rendered.labels == rendered.input_ids
        assert tokenizer.decode(rendered.input_ids) == "Once upon a time 👋<|im_end|>"


def test_many_at_once_are_what_they_are_one_by_one(tokenizer: Any) -> None:
    rows = [turns("a", "one"), [{"role": "assistant", "content": "odd"}], turns("b", "two 👋", "c", "three")]
    conversations = [*(Conversation(tuple(row)) for row in rows), Conversation(text="plain")]
    renderer = Renderer(with_template(tokenizer, GEMMA))
    found = renderer.many(conversations)
    assert [type(one).__name__ for one in found] == ["Rendered", "DataError", "Rendered", "Rendered"]
    assert found[0] == renderer(rows[0])
    assert found[2] == renderer(rows[2])
    assert "must alternate" in str(found[1])


def test_template_variables_reach_the_template(tokenizer: Any) -> None:
    template = "{{ date_string }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    other = with_template(tokenizer, template)
    rendered = Renderer(other, template_variables={"date_string": "26 Jul"})(turns("q", "one"))
    assert other.decode(rendered.input_ids).startswith("26 Jul")


def test_a_template_that_writes_the_date_is_told(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    template = "{{ strftime_now('%Y') if date_string is not defined else date_string }}" + GEMMA
    Renderer(with_template(tokenizer, template))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "writes today's date into every row" in warning
    assert 'data.chat_template_kwargs: {date_string: "26 Jul 2024"} fixes it' in warning
    caplog.clear()
    Renderer(with_template(tokenizer, template), template_variables={"date_string": "x"})
    assert not caplog.records


def test_two_assistant_turns_in_a_row(tokenizer: Any) -> None:
    messages = [*turns("a", "one"), {"role": "assistant", "content": "more"}]
    assert supervised_runs(tokenizer, Renderer(tokenizer)(messages)) == ["one<|im_end|>", "more<|im_end|>"]


def test_answer_equal_to_an_earlier_turn(tokenizer: Any) -> None:
    rendered = Renderer(tokenizer)(turns("same", "same", "same", "same"))
    assert supervised_runs(tokenizer, rendered) == ["same<|im_end|>"] * 2


def test_llama3_style(tokenizer: Any) -> None:
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    other = with_template(tokenizer, LLAMA3, *special)
    rendered = Renderer(other)(turns("q", "  trimmed  ", "r", "two 🧮", system="s"))
    assert supervised_runs(other, rendered) == ["trimmed<|eot_id|>", "two 🧮<|eot_id|>"]


def test_gemma_style(tokenizer: Any) -> None:
    other = with_template(tokenizer, GEMMA, "<start_of_turn>", "<end_of_turn>")
    renderer = Renderer(other)
    rendered = renderer(turns("q", "one", "r", "model"))
    assert supervised_runs(other, rendered) == ["one<end_of_turn>", "model<end_of_turn>"]
    with pytest.raises(DataError, match="System role not supported"):
        renderer(turns("q", "one", system="s"))
    with pytest.raises(DataError, match="roles must alternate"):
        renderer([*turns("q"), *turns("r", "one")])


def test_template_without_an_end_token(tokenizer: Any) -> None:
    rendered = Renderer(with_template(tokenizer, NO_END_TOKEN))(turns("q", "one", "r", "two"))
    other = with_template(tokenizer, NO_END_TOKEN)
    assert supervised_runs(other, rendered) == [" one\n", " two\n"]


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    renderer = Renderer(with_template(tokenizer, THINKING))
    with pytest.raises(DataError, match=r"leaves out the reasoning of turn 2 \(the part before </think>.*last-turn"):
        renderer(turns("q", "<think>hm</think>\none", "r", "two"))
    last = Renderer(renderer._tokenizer, "last-turn")(turns("q", "<think>hm</think>\none", "r", "two"))
    assert supervised_runs(renderer._tokenizer, last) == ["two<|im_end|>"]
    single = renderer(turns("q", "<think>hm</think>\none"))
    assert supervised_runs(renderer._tokenizer, single) == ["<think>hm</think>\none<|im_end|>"]
    assert renderer(turns("q", "one", "r", "two")).supervised > 0


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[7]['content'].strip() }}",
        "{% for m in messages %}{{ m['content'] + 5 }}{% endfor %}",
        "{% for %}",
        "{{ 1 // 0 }}",
    ],
)
def test_template_that_fails_is_a_data_error(tokenizer: Any, template: str) -> None:
    with pytest.raises(DataError, match=r"the chat template refuses this conversation: .+"):
        Renderer(with_template(tokenizer, template))(turns("q", "one"))


def test_plain_prompt_and_completion(tokenizer: Any) -> None:
    other = with_template(tokenizer, None)
    rendered = Renderer(other)(turns("The capital of France is", " Paris 👋"))
    assert other.decode(rendered.input_ids) == "The capital of France is Paris 👋<|im_end|>"
    assert supervised_runs(other, rendered) == [" Paris 👋<|im_end|>"]
    assert rendered.input_ids[-1] == rendered.labels[-1] == other.eos_token_id
    only_completion = Renderer(other)(turns("", "abc"))
    assert supervised_runs(other, only_completion) == ["abc<|im_end|>"]
    for messages in (turns("a", "b", "c", "d"), turns("a", "b", system="s"), turns("a")):
        with pytest.raises(DataError, match="has no chat template, which only a prompt and a completion can do"):
            Renderer(other)(messages)


def test_token_on_the_border_counts_as_the_answer(tokenizer: Any) -> None:
    """A prompt that ends in a space shares the answer's first token; leaving it out would lose short answers."""
    other = with_template(tokenizer, None)
    rendered = Renderer(other)(turns("The capital of France is ", "Paris"))
    assert supervised_runs(other, rendered) == [" Paris<|im_end|>"]
    rendered = Renderer(tokenizer)(turns("q", "   indented"))
    assert supervised_runs(tokenizer, rendered) == ["\n   indented<|im_end|>"]


def test_answers_that_the_template_leaves_out_are_refused(tokenizer: Any) -> None:
    template = "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"leaves out assistant messages \(turn 2\)"):
        Renderer(with_template(tokenizer, template))(turns("unbelievable", "x", "continuation"))


def test_plain_with_a_beginning_token(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    other = with_template(tokenizer, None)
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    rendered = Renderer(other)(turns("", "abc"))
    assert rendered.input_ids[0] == 0
    assert supervised_runs(other, rendered) == ["abc<|im_end|>"]


def test_tokenizers_that_cannot_be_used(tokenizer: Any) -> None:
    from types import SimpleNamespace

    with pytest.raises(ModelError, match=r"gives no character offsets; a tokenizer\.json is needed"):
        Renderer(SimpleNamespace(is_fast=False))  # type: ignore[arg-type]
    other = with_template(tokenizer, None)
    other.eos_token = None
    with pytest.raises(ModelError, match="neither a chat template nor an end-of-sequence token"):
        Renderer(other)


def test_the_first_token_never_counts_as_supervised() -> None:
    assert Rendered([5, 6], [5, 6]).supervised == 1
    assert Rendered([5, 6], [5, IGNORE]).supervised == 0


def test_turns_that_a_row_excludes_are_context(tokenizer: Any) -> None:
    messages = tuple(turns("a", "WRONG", "b", "right"))
    renderer = Renderer(tokenizer)
    (found,) = renderer.many([Conversation(messages, untrained=frozenset({1}))])
    assert isinstance(found, Rendered)
    assert renderer.decode([t for t, label in zip(found.input_ids, found.labels, strict=True) if label != IGNORE]) == (
        "right<|im_end|>"
    )
    (last,) = Renderer(tokenizer, "last-turn").many([Conversation(messages, untrained=frozenset({3}))])
    (every,) = renderer.many([Conversation(messages, untrained=frozenset({1, 3}))])
    (full,) = Renderer(tokenizer, "full").many([Conversation(messages, untrained=frozenset({1}))])
    assert "the last assistant turn is marked as not to be learned" in str(last)
    assert "every assistant turn is marked as not to be learned" in str(every)
    assert "turn 2 is marked as not to be learned, but data.turns: full" in str(full)
