"""`data.chat_template`, what templates may cost, special tokens that are written once, and reasoning."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from gradpursuit.data import IGNORE, Conversation, Rendered, Renderer, template_process
from gradpursuit.data.schemas import recognise
from gradpursuit.data.template_file import template_source
from gradpursuit.errors import ConfigError, DataError, ModelError
from gradpursuit.opening import read_config

TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def base() -> Any:
    """A beginning token by the post-processor, pad = end, no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<|im_end|>", "why", "because", "so", "<think>", "</think>", "<|user|>"]
    words += ["<|assistant|>", "<|system|>", "[INST]", "[/INST]"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>", "<|im_end|>", "<|user|>", "<|assistant|>", "<think>", "</think>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def words(tokenizer: Any, found: Rendered | DataError) -> tuple[str, str]:
    """All tokens, and the supervised ones."""
    assert isinstance(found, Rendered), found
    spoken = [token for token, label in zip(found.input_ids, found.labels, strict=True) if label != IGNORE]
    return " ".join(map(str, tokenizer.convert_ids_to_tokens(found.input_ids))), " ".join(
        map(str, tokenizer.convert_ids_to_tokens(spoken))
    )


@pytest.mark.parametrize(
    ("row", "whole", "spoken"),
    [
        (Conversation(text="why because"), "<s> why because </s>", "why because </s>"),
        (Conversation(text="<s> why because </s>"), "<s> why because </s>", "why because </s>"),
        (Conversation(text="why because</s>\n"), "<s> why because </s>", "why because </s>"),
        (Conversation(text=" <s><s> why because </s></s>\n"), "<s> why because </s>", "why because </s>"),
        (Conversation((user("why "), assistant("<s>because"))), "<s> why because </s>", "because </s>"),
        (Conversation((user(""), assistant("\n<s>because"))), "<s> because </s>", "because </s>"),
        (Conversation(text="why <|im_end|>"), "<s> why <|im_end|>", "why <|im_end|>"),
        (Conversation((user("why "), assistant("because</s>"))), "<s> why because </s>", "because </s>"),
        (Conversation((user("<s>why "), assistant("because"))), "<s> why because </s>", "because </s>"),
    ],
)
def test_special_tokens_of_plain_text_are_written_once(base: Any, row: Conversation, whole: str, spoken: str) -> None:
    assert words(base, Renderer(base).many([row])[0]) == (whole, spoken)


def test_a_tokenizer_that_adds_an_end_adds_no_second_one(base: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(base)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    for text in ("why", "why</s>", "<s>why</s>", " <s>why</s>\n"):
        assert words(made, Renderer(made).many([Conversation(text=text)])[0]) == ("<s> why </s>", "why </s>")


@pytest.mark.parametrize("end", ["", "</s>", " </s>\n", "</s></s>"])
@pytest.mark.parametrize("begin", ["", "<s>"])
def test_special_tokens_of_a_template_are_written_once(base: Any, begin: str, end: str) -> None:
    renderer = Renderer(base, chat_template=TURNS)
    row = [user(begin + "why "), assistant(" because" + end), user(" so "), assistant(" so" + end)]
    whole, spoken = words(base, renderer(row))
    assert whole == "<s> <|user|> why <|assistant|> because </s> <|user|> so <|assistant|> so </s>"
    assert spoken == "because </s> so </s>"


@pytest.mark.parametrize("end", ["", "<|im_end|>", " <|im_end|>\n"])
def test_the_end_of_a_user_turn_is_written_once(base: Any, end: str) -> None:
    chat = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|im_end|> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    row = [user("\n<s>why" + end), assistant("because" + end)]
    whole, spoken = words(base, Renderer(base, chat_template=chat)(row))
    assert whole == "<s> <|user|> why <|im_end|> <|assistant|> because <|im_end|>"
    assert spoken == "because <|im_end|>"
    assert (
        "<|user|> why </s> <|assistant|>"
        in words(base, Renderer(base, chat_template=TURNS)([user("why</s>"), row[1]]))[0]
    )


@pytest.mark.parametrize("marks", [False, True])
def test_the_role_mark_is_never_supervised(base: Any, marks: bool) -> None:
    """The prompt for an answer ends in <think>, which an answer need not have."""
    answers = "{{ '<|assistant|>' + m.content + eos_token }}"
    answers = "{% generation %}" + answers + "{% endgeneration %}" if marks else answers
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}" + answers + "{% else %}"
        "{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
    )
    renderer = Renderer(base, chat_template=template)
    for untrained, spoken in ((set(), "so </s> because </s>"), ({1}, "because </s>"), ({3}, "so </s>")):
        row = (user("so "), assistant(" so "), user("why "), assistant(" because "))
        assert words(base, renderer.many([Conversation(row, untrained=frozenset(untrained))])[0])[1] == spoken
    thinks = [user("why "), assistant("<think> so </think> because")]
    assert words(base, renderer(thinks))[1] == "so </think> because </s>"


def test_threads_and_forks_share_no_answers(base: Any) -> None:
    import os
    from concurrent.futures import ThreadPoolExecutor

    renderer = Renderer(base, chat_template=TURNS)
    rows = [[user("why " * (i + 1)), assistant(" so" * (i + 1))] for i in range(40)]
    wanted = [words(base, renderer(row)) for row in rows]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda row: words(base, renderer(row)), rows)) == wanted
    before = template_process._the_process
    child = os.fork()
    if child == 0:
        same = template_process._process() is before
        os._exit(int(same))
    assert os.waitpid(child, 0)[1] == 0
    assert template_process._process() is before


@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_of_a_turn_come_through_or_are_refused(base: Any, key: str) -> None:
    tool = {"type": "function", "function": {"name": "why", "parameters": {"type": "object"}}}
    row = recognise({"messages": [{**user("why "), key: [tool]}, assistant(" because")]}, {}, "file:7")[1]
    (refused,) = Renderer(base, chat_template=TURNS).many([row])
    assert "leaves out the tools of turn 1 ('why'); data.chat_template takes a template" in str(refused)
    assert "or move them to a column 'tools'" in str(refused)
    writes = TURNS.replace("m.content }}", f"(m.{key} | tojson if m.{key} else '') + m.content }}}}")
    assert words(base, Renderer(base, chat_template=writes).many([row])[0])[1] == "because </s>"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_comes_through_or_is_refused(base: Any, key: str) -> None:
    row = [user("why "), assistant(" because", **{key: "so so"})]
    with pytest.raises(DataError, match=rf"leaves out the reasoning of turn 2 \('{key}'\); data.chat_template"):
        Renderer(base, chat_template=TURNS)(row)
    writes = TURNS.replace("m.content }}", "(m.reasoning_content or '') + m.content }}")
    assert "so so because </s>" in words(base, Renderer(base, chat_template=writes)(row))[1]
    context = Conversation((*row, user(" why "), assistant(" so")), first=3)
    assert words(base, Renderer(base, chat_template=TURNS).many([context])[0])[1] == "so </s>"
    full = Renderer(base, "full", chat_template=TURNS).many([context])[0]
    assert "leaves out the reasoning of turn 2" in str(full)


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (TURNS.replace("m.content }}", "m.content[:8] }}"), [user("why " * 9), assistant(" so")], "a part of the user"),
        (TURNS.replace("m.content }}", "m.content.split('</b>')[-1] }}"), [user("why"), assistant("<b>so</b> so")],
         "a part of the assistant message of turn 2"),
        (TURNS.replace("m.content }}", "m.content.split('</think>')[-1] }}"),
         [user("<think>so</think>why"), assistant("so")], "a part of the user message of turn 1"),
        (TURNS, [user("why", name="Ada"), assistant("so")], "the name 'Ada' of turn 1"),
        (TURNS.replace("in messages", "in messages if m.role != 'system'"),
         [{"role": "system", "content": "so"}, user("why"), assistant("so")], r"system messages \(turn 1\)"),
    ],
)  # fmt: skip
def test_whatever_is_left_out_is_refused(base: Any, template: str, row: list[Any], reason: str) -> None:
    with pytest.raises(DataError, match=f"the chat template leaves out {reason}"):
        Renderer(base, chat_template=template)(row)


def test_templates_may_change_case_and_white_space(base: Any) -> None:
    template = TURNS.replace("m.content }}", "' ' + m.content.strip().lower() + ' ' }}")
    assert (
        words(base, Renderer(base, chat_template=template)([user("WHY"), assistant("  BECAUSE ")]))[1] == "because </s>"
    )


def test_keys_that_a_template_does_not_read_are_warned_of_once(base: Any, caplog: pytest.LogCaptureFixture) -> None:
    renderer = Renderer(base, chat_template=TURNS)
    for _ in range(2):
        renderer([user("why", mood="sad"), assistant("so")])
    assert [record.getMessage() for record in caplog.records] == [
        "messages have a key 'mood', which the chat template does not read"
    ]


@pytest.mark.parametrize(
    "loop",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 10 ** (10 ** 9) }}{% endfor %}",
    ],
)
def test_a_template_that_loops_is_ended(base: Any, loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.5)
    with pytest.raises((ModelError, ConfigError), match=r"takes more than 0\.5 seconds"):
        Renderer(base, chat_template=loop)
    monkeypatch.setattr(template_process, "SECONDS", 60)
    assert words(base, Renderer(base, chat_template=TURNS)([user("why "), assistant(" so")]))[1] == "so </s>"


def test_a_template_that_fills_memory_is_ended(base: Any) -> None:
    with pytest.raises(ModelError, match="needs more than 1,024 MB of memory for one conversation"):
        Renderer(base, chat_template="{{ messages[0].content * (10 ** 11) }}")


def test_a_template_that_calls_itself(base: Any) -> None:
    with pytest.raises(DataError, match="calls itself without end"):
        Renderer(base, chat_template="{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")([user("x"), assistant("y")])


def test_the_template_of_the_docs(base: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    (template,) = re.findall(r"```jinja\n(.*?)```", page, re.DOTALL)
    renderer = Renderer(base, chat_template=template)
    row = [{"role": "system", "content": "so"}, user("why"), assistant("because"), user("so"), assistant("so")]
    whole, spoken = words(base, renderer(row))
    assert whole == "<s> <|system|> so <|user|> why <|assistant|> because </s> <|user|> so <|assistant|> so </s>"
    assert spoken == "because </s> so </s>"
    assert renderer.masks == "data.chat_template rendered turn by turn"


def test_templates_that_cannot_be_used(base: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    for content, reason in (
        ("a\nb\n{% for %}", r"chat\.jinja': line 3: Expected an expression"),
        ("no tags", "holds no Jinja template"),
        ('{"chat_template": "{{ x }}"}', "a JSON file"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=reason):
            Renderer(base, chat_template=str(path))
    path.write_bytes(b"\xff{{ x }}")
    with pytest.raises(ConfigError, match="not UTF-8"):
        Renderer(base, chat_template=str(path))
    for value in (str(tmp_path), str(tmp_path / "none.jinja"), "a\0b", "~nosuchuser/x"):
        with pytest.raises(ConfigError, match=r"data\.chat_template .*: cannot be read"):
            template_source(value)


def test_without_a_template_the_setting_is_named(base: Any) -> None:
    row = [user("why"), assistant("so"), user("why"), assistant("so")]
    with pytest.raises(DataError, match=r"no chat template.*set data\.chat_template"):
        Renderer(base)(row)


def test_the_path_is_absolute_and_known_by_content(tmp_path: Path, tiny_path: Path) -> None:
    from gradpursuit.pipeline import Run

    (tmp_path / "chat.jinja").write_text(TURNS)
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "c.yaml").write_text(
        f"model: {{path: '{tiny_path}'}}\nrun_dir: {tmp_path}/run\n"
        f"data: {{pool: {tmp_path}/rows.jsonl, target: {tmp_path}/rows.jsonl, chat_template: {tmp_path}/chat.jinja}}\n"
    )
    config = read_config(tmp_path / "c.yaml", [])
    assert config.data.chat_template == str(tmp_path / "chat.jinja")
    first = Run(config).fingerprint("data")
    (tmp_path / "other.jinja").write_text(TURNS)
    assert (
        Run(read_config(tmp_path / "c.yaml", [f"data.chat_template={tmp_path}/other.jinja"])).fingerprint("data")
        == first
    )
    (tmp_path / "chat.jinja").write_text(TURNS + " ")
    assert Run(config).fingerprint("data") != first
