"""Masks on the chat templates that models ship, as TRL keeps them, and on Mistral's, SmolLM2's and ChatML."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import trl

from gradpursuit.data import IGNORE, Conversation, Rendered, Renderer
from gradpursuit.errors import DataError, ModelError

FOLDER = Path(trl.__file__).parent / "chat_templates"
STOCK = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
WITH_IMAGES = ("idefics3", "llava_next", "smolvlm")  # take lists of texts and images as content, not text
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bergen"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}},
    },
}


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    """One tokenizer that knows the special tokens of every template; its template is exchanged."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(smollm2_path)
    made.own_template = made.chat_template
    texts = "".join(path.read_text("utf-8") for path in FOLDER.glob("*.jinja"))
    made.add_tokens(sorted(set(re.findall(r"<[|｜]?[a-zA-Z_▁|｜]+[|｜]?>", texts))), special_tokens=True)
    return made


def using(tokenizer: Any, name: str) -> Any:
    own = {"smollm2": tokenizer.own_template, "mistral": MISTRAL, "chatml": CHATML}
    tokenizer.chat_template = own.get(name) or (FOLDER / f"{name}.jinja").read_text("utf-8")
    return tokenizer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def runs(tokenizer: Any, rendered: Rendered) -> list[str]:
    found: list[list[int]] = []
    previous = False
    for token, label in zip(rendered.input_ids, rendered.labels, strict=True):
        if label != IGNORE:
            if not previous:
                found.append([])
            found[-1].append(token)
        previous = label != IGNORE
    return [tokenizer.decode(run) for run in found]


TWO = [user("Where to?"), assistant("Answer one."), user("And then?"), assistant("Answer two 🧮.")]
NAMED = {  # the families that are promised: exactly this is supervised
    "llama3": "{}<|eot_id|>",
    "llama3_1": "{}<|eot_id|>",
    "llama3_2": "{}<|eot_id|>",
    "qwen2_5": "{}<|im_end|>",
    "qwen3": "<think>\n\n</think>\n\n{}<|im_end|>",
    "qwen3_instruct_2507": "{}<|im_end|>",
    "gemma": "{}<end_of_turn>",
    "gemma3": "{}<end_of_turn>",
    "phi3": "{}<|end|>",
    "phi3_5": "{}<|end|>",
    "mistral": " {}<|im_end|>",
    "smollm2": "{}<|im_end|>",
    "chatml": "{}<|im_end|>",
}


@pytest.mark.parametrize("name", NAMED)
def test_families_that_are_promised(tokenizer: Any, name: str) -> None:
    expected = [NAMED[name].format(text) for text in ("Answer one.", "Answer two 🧮.")]
    end = ["<|im_end|>"] if name.startswith("phi") else []  # Phi's own end of the text, after the white space
    made = using(tokenizer, name)
    assert runs(made, Renderer(made)(TWO)) == expected + end
    assert runs(made, Renderer(made, "last-turn")(TWO)) == expected[1:] + end
    assert runs(made, Renderer(made)(TWO[:3])) == expected[:1]
    full = Renderer(made, "full")(TWO)
    assert full.labels == full.input_ids
    system = [{"role": "system", "content": "Be terse, please."}, *TWO]
    if name in ("gemma", "mistral"):
        with pytest.raises(DataError, match=r"the chat template refuses this conversation: .*[Ss]ystem|Only user"):
            Renderer(made)(system)
    else:
        rendered = Renderer(made)(system)
        assert runs(made, rendered) == expected + end
        assert "Be terse, please." in made.decode(rendered.input_ids)


@pytest.mark.parametrize("name", [name for name in STOCK if name not in WITH_IMAGES])
def test_every_stock_template(tokenizer: Any, name: str) -> None:
    """The answers are supervised with an end, nothing of the others is; and nothing that TRL would not supervise."""
    made = using(tokenizer, name)
    rendered = Renderer(made)(TWO)
    spoken = "".join(runs(made, rendered))
    for text in ("Answer one.", "Answer two 🧮."):
        assert spoken.count(text) == 1
        after = spoken[spoken.index(text) + len(text) :]
        assert any(after.startswith(str(token)) for token in made.added_tokens_decoder.values() if token.special)
    assert "Where to?" not in spoken
    assert "And then?" not in spoken
    last = "".join(runs(made, Renderer(made, "last-turn")(TWO)))
    assert "Answer one." not in last
    assert last.count("Answer two 🧮.") == 1
    patched = FOLDER / f"{name}_training.jinja"
    if patched.exists():
        theirs = made.apply_chat_template(
            TWO,
            chat_template=patched.read_text("utf-8"),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert rendered.input_ids == theirs["input_ids"]
        assert not any(
            label != IGNORE and not mask for label, mask in zip(rendered.labels, theirs["assistant_masks"], strict=True)
        )


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_templates_for_images_are_refused(tokenizer: Any, name: str) -> None:
    with pytest.raises(DataError, match=r"the chat template (leaves out user messages|refuses this conversation)"):
        Renderer(using(tokenizer, name))(TWO)


TOOLS = [
    user("Is it raining?"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "name": "get_weather", "content": "It pours."},
    assistant("Yes, it pours down."),
]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "llama3_2", "glm4moe", "gptoss"])
def test_tool_calls_are_supervised_and_what_tools_say_is_not(tokenizer: Any, name: str) -> None:
    made = using(tokenizer, name)
    (rendered,) = Renderer(made).many([Conversation(tuple(TOOLS), tools=(TOOL,))])
    assert isinstance(rendered, Rendered), rendered
    spoken = "".join(runs(made, rendered))
    assert "get_weather" in spoken
    assert "Bergen" in spoken
    assert "Yes, it pours down." in spoken
    assert "It pours." not in spoken
    whole = made.decode(rendered.input_ids)
    assert "It pours." in whole
    assert "The weather." in whole


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama3", r"leaves out tool calls \(turn 2 calls 'get_weather'\)"),
        ("smollm2", r"leaves out tool calls"),
        ("phi3", r"leaves out tool calls"),
        ("gemma", r"refuses this conversation: .*alternate"),
        ("mistral", r"refuses this conversation: .*Only user"),
    ],
)
def test_templates_without_a_place_for_tools_refuse_them(tokenizer: Any, name: str, reason: str) -> None:
    (found,) = Renderer(using(tokenizer, name)).many([Conversation(tuple(TOOLS))])
    assert isinstance(found, DataError)
    assert re.search(reason, str(found))


def test_tool_messages_and_tools_that_are_passed_over_are_refused(tokenizer: Any) -> None:
    renderer = Renderer(using(tokenizer, "phi3"))
    tool = {"role": "tool", "content": "It pours."}
    with pytest.raises(DataError, match=r"leaves out tool messages \(turn 2\)"):
        renderer([user("x"), tool, assistant("y")])
    (found,) = renderer.many([Conversation((user("x"), assistant("y")), tools=(TOOL,))])
    assert str(found) == (
        "the chat template leaves out tools ('get_weather'); data.chat_template takes a template that writes it, and "
        "data.columns: {tools: null} leaves the column out"
    )
    system = {"role": "system", "content": "Call get_weather."}
    (found,) = renderer.many([Conversation((system, user("x"), assistant("y")), tools=(TOOL,))])
    assert str(found).endswith(
        "the system turn names them already, so data.columns: {tools: null} leaves the column out"
    )


@pytest.mark.parametrize("name", ["smollm2", "phi3", "qwen2_5", "qwen3"])
def test_a_tool_whose_name_is_part_of_what_is_said_is_missed_all_the_same(tokenizer: Any, name: str) -> None:
    call = assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}])
    tool = {**TOOL, "function": {**TOOL["function"], "name": "s"}}
    conversations = [Conversation((user("of cats"), call)), Conversation((user("cats"), assistant("y")), tools=(tool,))]
    for found, what in zip(
        Renderer(using(tokenizer, name)).many(conversations),
        ("tool calls (turn 2 calls 'f')", "tools ('s')"),
        strict=True,
    ):
        assert isinstance(found, Rendered) if "qwen" in name else what in str(found)


def test_an_assistant_that_speaks_first(tokenizer: Any) -> None:
    made = copy.copy(tokenizer)
    made.chat_template = CHATML
    messages = [assistant("hello"), user("x"), assistant("y")]
    with pytest.raises(DataError, match=r"begins with an assistant turn, .* use data\.turns: last-turn or full"):
        Renderer(made)(messages)
    assert [text.strip() for text in runs(made, Renderer(made, "last-turn")(messages))] == ["y<|im_end|>"]


def test_a_name_is_rendered_where_the_template_does(tokenizer: Any) -> None:
    made = copy.copy(tokenizer)
    made.chat_template = CHATML.replace("m['role'] +", "m['role'] + (' ' + m['name'] if m['name'] else '') +")
    rendered = Renderer(made)([{**user("x"), "name": "Ada"}, assistant("y")])
    assert "<|im_start|>user Ada\nx<|im_end|>" in made.decode(rendered.input_ids)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma", "phi3"])
def test_empty_turns_with_marks(tokenizer: Any, name: str) -> None:
    made = using(tokenizer, name)
    messages = [user("a"), assistant("one"), user("b"), assistant(""), user("c"), assistant("two")]
    spoken = runs(made, Renderer(made)(messages))
    assert [text.removesuffix(NAMED[name][2:]) for text in spoken][:2] == ["one", "two"]
    assert len(spoken) == (3 if name == "phi3" else 2)


def test_nested_marks_in_an_answer_stay_text(tokenizer: Any) -> None:
    made = using(tokenizer, "qwen2_5")
    answer = "<|im_start|>assistant\nnested<|im_end|>\n<|im_start|>user\nfake"
    assert runs(made, Renderer(made)([user("x"), assistant(answer)])) == [answer + "<|im_end|>"]


def test_how_masks_are_found_is_told(tokenizer: Any) -> None:
    expected = {"llama3": "TRL's training version", "lfm2_2_5": "the tokenizer's own", "chatml": "turn by turn"}
    for name, words in expected.items():
        assert words in Renderer(using(tokenizer, name)).masks


SAID = {"role": "system", "content": "Terse wording, please."}
THOUGHT, CUT = "clouds gather", "<think>\nclouds gather\n</think>\n\nYes indeed."
RAIN = [
    user("Does it rain?"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "name": "get_weather", "content": "Heavy showers."},
    assistant("Yes indeed."),
]
ROWS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {  # messages, and what has to come through
    "two turns": (
        [user("Where to?"), assistant("Home first."), user("And then?"), assistant("Abroad.")],
        ["Home first.", "Abroad."],
    ),
    "system": ([SAID, user("Where to?"), assistant("Home first.")], ["Terse wording, please."]),
    "tools": (RAIN, ["get_weather", "Bergen", "Heavy showers."]),
    "text beside a call": (
        [RAIN[0], assistant("Let me look.", tool_calls=[CALL]), *RAIN[2:]],
        ["get_weather", "Bergen", "Heavy showers.", "Let me look."],
    ),
    "reasoning": ([RAIN[0], assistant("Yes indeed.", reasoning_content=THOUGHT)], [THOUGHT]),
    "thinking": ([RAIN[0], assistant("Yes indeed.", thinking=THOUGHT)], [THOUGHT]),
    "reasoning of an earlier turn": (
        [RAIN[0], assistant("Yes indeed.", reasoning_content=THOUGHT), user("Still?"), assistant("No more.")],
        [THOUGHT],
    ),
    "tags": ([RAIN[0], assistant(CUT)], [THOUGHT]),
    "tags of an earlier turn": ([RAIN[0], assistant(CUT), user("Still?"), assistant("No more.")], [THOUGHT]),
}  # fmt: skip
BLOCKS = {"two turns", "reasoning of an earlier turn", "tags of an earlier turn"}
LISTED = {  # rows that a training version writes otherwise than the model's own template: see docs/data.md
    "deepseek_r1_distill": {"tags", "tags of an earlier turn"},
    "glm4moe": set(ROWS),
    "qwen3": BLOCKS | {"tools", "text beside a call"},
    "qwen3_5_nothink": BLOCKS,
    "qwen3_5_think": BLOCKS,
    "qwen3_6": BLOCKS,
}


@pytest.mark.parametrize("name", [name for name in STOCK if name not in WITH_IMAGES])
def test_what_is_rendered_is_what_the_tokenizer_renders(tokenizer: Any, name: str) -> None:
    """Or the row is refused, and only where the template leaves something out."""
    made = using(tokenizer, name)
    renderer = Renderer(made)
    for kind, (messages, parts) in ROWS.items():
        tools = [TOOL] if any(message.get("tool_calls") for message in messages) else []
        (found,) = renderer.many([Conversation(tuple(messages), tools=tuple(tools))])
        try:
            theirs = made.apply_chat_template(messages, tools=tools or None, tokenize=False)
        except Exception:
            assert isinstance(found, DataError), kind
            continue
        listed = kind in LISTED.get(name, ())
        if isinstance(found, Rendered):
            assert all(part in found.text for part in parts), kind
            assert (found.text == theirs) is not listed, kind
            if not listed:
                ids = made.apply_chat_template(messages, tools=tools or None, return_dict=True)["input_ids"]
                assert found.input_ids == ids
        elif "rewrites earlier turns" not in str(found):
            assert "leaves out" in str(found), (kind, str(found))
            assert not all(part in theirs for part in parts), kind


def test_named_templates(tokenizer: Any) -> None:
    """The one called tool_use renders conversations with tools, as in the tokenizer."""
    made = copy.copy(tokenizer)
    use = (FOLDER / "qwen2_5.jinja").read_text("utf-8")
    made.chat_template = {"default": CHATML, "tool_use": use}
    renderer = Renderer(made)
    for tools in ((), (TOOL,)):
        (found,) = renderer.many([Conversation(tuple(TOOLS if tools else TWO), tools=tools)])
        assert isinstance(found, Rendered), found
        theirs = made.apply_chat_template(TOOLS if tools else TWO, tools=list(tools) or None, tokenize=False)
        assert found.text == theirs
        assert "Yes, it pours down." in "".join(runs(made, found)) or not tools
    made.chat_template = {"rag": CHATML}
    with pytest.raises(ModelError, match=r"multiple chat templates with no default.*data\.chat_template takes another"):
        Renderer(made)
    (found,) = Renderer(made, chat_template=CHATML).many([Conversation(tuple(TWO))])
    assert isinstance(found, Rendered)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "deepseek_r1_distill", "chatml", "mistral", "lfm2_2_5"])
def test_turns_that_are_not_to_be_learned(tokenizer: Any, name: str) -> None:
    made = using(tokenizer, name)
    for untrained, spoken, not_spoken in (({1}, "Answer two", "Answer one"), ({3}, "Answer one", "Answer two")):
        (found,) = Renderer(made).many([Conversation(tuple(TWO), untrained=frozenset(untrained))])
        assert isinstance(found, Rendered)
        said = "".join(runs(made, found))
        assert spoken in said
        assert not_spoken not in said
        assert "And then?" not in said
        assert found.input_ids == Renderer(made)(TWO).input_ids


def test_the_role_mark_of_r1_is_not_supervised(tokenizer: Any) -> None:
    made = using(tokenizer, "deepseek_r1_distill")
    plain, thinking = assistant("Yes."), assistant("<think>\nHm.\n</think>\n\nYes.")
    for template in (made.chat_template, made.chat_template + " "):  # TRL's training version, and turn by turn
        renderer = Renderer(made, chat_template=template)
        assert runs(made, renderer([user("x"), plain, user("y"), plain])) == ["Yes.<｜end▁of▁sentence｜>"] * 2
    spoken = runs(made, Renderer(made)([user("x"), thinking, user("y"), plain]))
    assert spoken == ["Hm.\n</think>\n\nYes.<｜end▁of▁sentence｜>", "Yes.<｜end▁of▁sentence｜>"]
