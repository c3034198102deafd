"""Where in the rendered text of a conversation the assistant speaks.

A chat template that marks it with `{% generation %}` is asked. Of the families whose own template does not, TRL ships
training versions that do, and those are used instead: the same text but for what TRL's page of templates says (the
training version of Qwen 3 keeps the reasoning block of every turn). For any other template the conversation is
rendered up to every assistant turn and on to its end, which works with templates that render turns in order; one that
rewrites earlier turns when later ones come is refused, because its spans could not be trusted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from gradpursuit.data.schemas import Conversation, Message
from gradpursuit.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("gradpursuit")
Span = tuple[int, int]  # of characters
_WORD = re.compile(r"[^\W_]+")


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: with a chat template.
        variables: for the template, beside the conversation.

    Attributes:
        origin: in words, how the assistant's turns are found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any]) -> None:
        self._tokenizer, self._variables = tokenizer, dict(variables)
        self._marked, self.origin = _marked_template(tokenizer)
        self._prompt = self._generation_prompt() if self._marked else ""
        special = (token for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._ends = {str(token) for token in (tokenizer.eos_token, *special) if token}
        source = str(self._marked or tokenizer.chat_template)
        if "strftime_now" in source and "date_string" not in variables:
            fixed = (
                '; data.chat_template_kwargs: {date_string: "26 Jul 2024"} fixes it' if "date_string" in source else ""
            )
            logger.warning(
                "the chat template writes today's date into every row, so tokens change with the day%s", fixed
            )

    def render(self, conversation: Conversation, turns: Sequence[int]) -> tuple[str, list[Span]]:
        """The whole text, and where in it the assistant speaks in the messages at `turns`: text and end token.

        What the template puts before an answer when it asks for one, and white space after an end token, are no part
        of a span.

        Raises:
            DataError: the template refuses the conversation, leaves out a part of it, or rewrites earlier turns.
        """
        text, spans = (self._by_marks if self._marked else self._by_prefixes)(conversation, turns)
        self._refuse_left_out_tools(conversation, text)
        _refuse_left_out_messages(conversation, text)
        return text, [self._trimmed(text, span) for span in spans]

    def _refuse_left_out_tools(self, conversation: Conversation, text: str) -> None:
        """See that tool calls, and the tools themselves, came through the template: rendered under other names, each
        has to come up, which its own name may do in what else is said.

        Raises:
            DataError: naming the first that does not.
        """
        mark = "q"
        while mark in text:
            mark += "q"
        renamed, names = _renamed(conversation, mark)
        if not names:
            return
        if self._marked:
            rendered = self._with_marks(renamed, len(renamed.messages), prompt=False)[0]
        else:
            rendered = self._plainly(renamed, len(renamed.messages), prompt=False)
        for name, what in names.items():
            if name not in rendered:
                hint = "; data.columns: {tools: null} leaves the column out" if what.startswith("tools") else ""
                raise DataError(f"the chat template leaves out {what}{hint}")

    def _by_marks(self, conversation: Conversation, turns: Sequence[int]) -> tuple[str, list[Span]]:
        text, spans = self._with_marks(conversation, len(conversation.messages), prompt=False)
        speaking = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if list(turns) == speaking:
            return text, spans
        chosen: list[Span] = []
        for turn in turns:
            before = self._with_marks(conversation, turn, prompt=True)[1]
            until = spans if turn == speaking[-1] else self._with_marks(conversation, turn + 1, prompt=True)[1]
            if until != spans[: len(until)] or before != until[: len(before)]:
                raise self._rewritten(turn)
            chosen += until[len(before) :]
        return text, chosen

    def _with_marks(self, conversation: Conversation, end: int, *, prompt: bool) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        if end == 0:
            return "", []

        def render() -> Any:
            return render_jinja_template(
                conversations=[_plain(conversation.messages[:end])],
                tools=_plain(conversation.tools) or None,
                chat_template=self._marked,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **self._variables},
            )

        texts, spans = _guarded(render)
        return texts[0], [(start, stop) for start, stop in spans[0] if stop > start]

    def _by_prefixes(self, conversation: Conversation, turns: Sequence[int]) -> tuple[str, list[Span]]:
        last = len(conversation.messages) - 1
        text = self._plainly(conversation, last + 1, prompt=False)
        spans = []
        if turns and turns[0] == 0:
            raise DataError(
                "the conversation begins with an assistant turn, whose start cannot be found where templates are "
                "rendered turn by turn; use data.turns: last-turn or full, or remove the turn"
            )
        for turn in turns:
            prefix = self._plainly(conversation, turn, prompt=True)
            until = text if turn == last else self._plainly(conversation, turn + 1, prompt=False)
            if turn != last and not text.startswith(until):
                until = until[: self._trimmed(until, (len(prefix), len(until)))[1]]
            if not until.startswith(prefix) or not text.startswith(until):
                raise self._rewritten(turn)
            spans.append((len(prefix), len(until)))
        return text, spans

    def _plainly(self, conversation: Conversation, end: int, *, prompt: bool) -> str:
        def render() -> Any:
            return self._tokenizer.apply_chat_template(
                _plain(conversation.messages[:end]),
                tools=_plain(conversation.tools) or None,
                tokenize=False,
                add_generation_prompt=prompt,
                **self._variables,
            )

        return str(_guarded(render))

    def _trimmed(self, text: str, span: Span) -> Span:
        """A span without what the prompt for an answer ends with, and without white space after an end token."""
        start, stop = span
        if self._prompt:
            found = text.find(self._prompt, max(0, start - len(self._prompt)), start + len(self._prompt))
            if found >= 0 and start < found + len(self._prompt) <= stop:
                start = found + len(self._prompt)
        spoken = text[start:stop].rstrip()
        if any(map(spoken.endswith, self._ends)):
            stop = start + len(spoken)
        return start, stop

    def _generation_prompt(self) -> str:
        """What the template adds to ask for an answer."""
        asked = Conversation(({"role": "user", "content": "x"},))
        try:
            without, with_prompt = (self._with_marks(asked, 1, prompt=prompt)[0] for prompt in (False, True))
        except DataError:  # a template that does not take this conversation may well take those of the data
            return ""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(without, with_prompt, strict=False))
        return with_prompt[len(list(same)) :]

    def _rewritten(self, turn: int) -> DataError:
        return DataError(
            f"the chat template rewrites earlier turns when turn {turn + 1} is added, so the tokens of the assistant "
            "cannot be told apart; use a training version of the template (with {% generation %}), or data.turns: "
            "last-turn or full"
        )


def _marked_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A template with marks, and where it is from; empty if there is none for this tokenizer."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    try:
        own = tokenizer.get_chat_template()
    except ValueError as error:
        raise ModelError(f"the tokenizer's chat template cannot be used: {error}") from None
    if has_generation_markers(own):
        return own, "marks of the tokenizer's own chat template"
    try:
        patched = get_training_chat_template(tokenizer)
    except Exception:  # a ValueError for a template it does not know, and whatever an odd template raises when tried
        patched = None
    if patched is not None:
        return str(patched), "marks of TRL's training version of the chat template"
    return "", "the chat template rendered turn by turn"


def _guarded(render: Callable[[], Any]) -> Any:
    try:
        return render()
    except Exception as error:  # a template is a program of its own, and can fail in any way
        raise DataError(f"the chat template refuses this conversation: {error}") from None


def _plain(values: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [dict(value) for value in values]


def _refuse_left_out_messages(conversation: Conversation, text: str) -> None:
    """See that what is said to the assistant came through the template: some pass over tool messages without a word.

    The longest word of each has to be there: templates may trim and quote what they are given, but keep words.
    """
    for index, message in enumerate(conversation.messages, 1):
        if message["role"] != "assistant" and _longest_word(message["content"]) not in text:
            raise DataError(f"the chat template leaves out {message['role']} messages (turn {index})")


def _renamed(conversation: Conversation, mark: str) -> tuple[Conversation, dict[str, str]]:
    """The conversation with names of its own for every tool call and tool, and what each of these names stands for."""
    names: dict[str, str] = {}

    def rename(value: Mapping[str, Any], what: str) -> dict[str, Any]:
        if "function" in value:
            return {**value, "function": rename(value["function"], what)}
        names[name := f"{mark}{len(names)}z"] = f"{what}{value.get('name', '')}')"
        return {**value, "name": name}

    def messages() -> Iterator[Message]:
        for index, message in enumerate(conversation.messages, 1):
            calls = [rename(call, f"tool calls (turn {index} calls '") for call in message.get("tool_calls") or ()]
            yield {**message, "tool_calls": calls} if calls else message

    changed = replace(conversation, messages=tuple(messages()))
    return replace(changed, tools=tuple(rename(tool, "tools ('") for tool in conversation.tools)), names


def _longest_word(text: str) -> str:
    return max(_WORD.findall(text), key=len, default="")
