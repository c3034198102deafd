"""Where in the rendered text of a conversation the assistant speaks.

A chat template that marks it with `{% generation %}` is asked. Of the families whose own template does not, TRL ships
training versions that do, and those are used instead: the same text but for what TRL's page of templates says (the
training version of Qwen 3 keeps the reasoning block of every turn). For any other template the conversation is
rendered up to every assistant turn and on to its end, which works with templates that render turns in order; one that
rewrites earlier turns when later ones come is refused, because its spans could not be trusted.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpursuit.data.completeness import REASONING, Marked
from gradpursuit.data.schemas import Conversation
from gradpursuit.data.template_process import Span, check_template, rendered
from gradpursuit.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("gradpursuit")
# Keys of a message that are looked at elsewhere, or that only number it.
_KNOWN = {"role", "content", "name", "tool_calls", "tool_call_id", "id", "weight", "train", *REASONING}


@dataclass(frozen=True)
class _Form:
    """One of the templates of a tokenizer, and what was found out of it.

    Attributes:
        source: that is rendered.
        marks: it marks the assistant's turns itself.
        prompt: what it adds to ask for an answer.
        role: the part of it with which an answer begins that has no reasoning.
        begin: the special token that it writes first; empty: none.
        end: the special token that it writes after an answer; empty: none.
        closes: the same of a user turn.
    """

    source: str
    marks: bool
    prompt: str = ""
    role: str = ""
    begin: str = ""
    end: str = ""
    closes: str = ""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: with a chat template.
        variables: for the template, beside the conversation.
        setting: `data.chat_template`, if the template is from there; for messages.

    Attributes:
        origin: in words, how the assistant's turns are found.

    Raises:
        ConfigError: the template that was given cannot be parsed.
        ModelError: the template takes too long, or too much memory.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any], setting: str | None = None
    ) -> None:
        self._tokenizer, self._variables = tokenizer, {**tokenizer.special_tokens_map, **variables}
        special = (token for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._ends = {str(token) for token in (tokenizer.eos_token, *special) if token}
        self._forms: dict[str, _Form] = {}
        self._unread: set[str] = set()
        own = _template_of(tokenizer, tools=False)
        if setting is not None:
            check_template(own, setting)
        self.origin = _marked(own)[1]
        if setting is not None:
            self.origin = self.origin.replace("the tokenizer's own", "the").replace(
                "the chat template", "data.chat_template"
            )
        source = self._form(own).source
        if "strftime_now" in source and "date_string" not in variables:
            fixed = (
                '; data.chat_template_kwargs: {date_string: "26 Jul 2024"} fixes it' if "date_string" in source else ""
            )
            logger.warning(
                "the chat template writes today's date into every row, so tokens change with the day%s", fixed
            )

    def render(
        self, conversation: Conversation, turns: Sequence[int], needed: Sequence[int] | None = None
    ) -> tuple[str, list[Span]]:
        """The whole text, and where in it the assistant speaks in the messages at `turns`: text and end token.

        What the template puts before an answer when it asks for one, and white space after an end token, are no part
        of a span. A special token that both the row and the template write at the same place is written once.

        Args:
            conversation: to be rendered.
            turns: positions of the messages that are supervised.
            needed: positions of those whose reasoning has to come through; None: `turns`.

        Raises:
            DataError: the template refuses the conversation, leaves out a part of it, or rewrites earlier turns.
            ModelError: it takes too long, or too much memory.
        """
        form = self._form(_template_of(self._tokenizer, tools=bool(conversation.tools)))
        self._warn_of_unread_keys(conversation, form)
        conversation = self._once(conversation, form)
        whole = self._rendered(form, conversation, len(conversation.messages), prompt=False)
        self._refuse_left_out(form, conversation, whole[0], set(turns if needed is None else needed))
        text, spans = (self._by_marks if form.marks else self._by_prefixes)(form, conversation, turns, whole)
        return text, [self._trimmed(form, text, span) for span in spans]

    def _form(self, own: str) -> _Form:
        if own not in self._forms:
            marked, _ = _marked(own)
            self._forms[own] = self._explored(_Form(marked or own, bool(marked)))
        return self._forms[own]

    def _explored(self, form: _Form) -> _Form:
        """The form, with what it writes around an answer."""
        user, answer = {"role": "user", "content": "x7z"}, "q0z"
        asked = Conversation((user,))
        answered = Conversation((user, {"role": "assistant", "content": answer}))
        try:
            without, with_prompt = (self._rendered(form, asked, 1, prompt=prompt)[0] for prompt in (False, True))
            text = self._rendered(form, answered, 2, prompt=False)[0]
        except DataError:  # a template that does not take this conversation may well take those of the data
            return form
        asking = len(_common(without, with_prompt))
        prompt = with_prompt[asking:]
        head, found, tail = text.partition(answer)
        role = _common(prompt, head[asking:]) if found else ""
        begin = str(self._tokenizer.bos_token or "")
        ends = [end for end in self._ends if found and tail.lstrip().startswith(end)]
        after = without.rpartition("x7z")[2].lstrip()
        closes = [end for end in self._ends if after.startswith(end)]
        return replace(
            form,
            prompt=prompt,
            role=role,
            begin=begin if begin and text.startswith(begin) else "",
            end=max(ends, key=len, default=""),
            closes=max(closes, key=len, default=""),
        )

    def _once(self, conversation: Conversation, form: _Form) -> Conversation:
        """The conversation without the special tokens at its borders that the template writes itself."""
        made = [dict(message) for message in conversation.messages]
        while form.begin and made and made[0]["content"].lstrip().startswith(form.begin):
            made[0]["content"] = made[0]["content"].lstrip()[len(form.begin) :]
        # The tokenizer's end token says the same as another one that the template writes.
        ends = tuple({form.end, str(self._tokenizer.eos_token or form.end)}) if form.end else ()
        for message in made if ends else ():
            said = message["content"].rstrip()
            closed = ends if message["role"] == "assistant" else (form.closes,) if form.closes else ()
            while closed and said.endswith(closed):
                end = max(filter(said.endswith, closed), key=len)
                said = message["content"] = said[: -len(end)].rstrip()
        return replace(conversation, messages=tuple(made))

    def _warn_of_unread_keys(self, conversation: Conversation, form: _Form) -> None:
        """Warn once of each key of a message that holds something, and that the template does not name."""
        for key in {key for message in conversation.messages for key, value in message.items() if value}:
            if key not in _KNOWN and key not in self._unread and key not in form.source:
                self._unread.add(key)
                logger.warning("messages have a key %r, which the chat template does not read", key)

    def _refuse_left_out(self, form: _Form, conversation: Conversation, text: str, needed: set[int]) -> None:
        """See that all that the row says came through.

        Raises:
            DataError: naming the first that did not.
        """
        marked = Marked(conversation, text)
        rendered = self._rendered(form, marked.conversation, len(conversation.messages), prompt=False)[0]
        if lost := marked.left_out(rendered, needed):
            raise DataError(lost)

    def _by_marks(
        self, form: _Form, conversation: Conversation, turns: Sequence[int], whole: tuple[str, list[Span]]
    ) -> tuple[str, list[Span]]:
        text, spans = whole
        speaking = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if list(turns) == speaking:
            return text, spans
        chosen: list[Span] = []
        for turn in turns:
            before = self._rendered(form, conversation, turn, prompt=True)[1]
            until = spans if turn == speaking[-1] else self._rendered(form, conversation, turn + 1, prompt=True)[1]
            if until != spans[: len(until)] or before != until[: len(before)]:
                raise self._rewritten(turn)
            chosen += until[len(before) :]
        return text, chosen

    def _by_prefixes(
        self, form: _Form, conversation: Conversation, turns: Sequence[int], whole: tuple[str, list[Span]]
    ) -> tuple[str, list[Span]]:
        last, text = len(conversation.messages) - 1, whole[0]
        spans = []
        if turns and turns[0] == 0:
            raise DataError(
                "the conversation begins with an assistant turn, whose start cannot be found where templates are "
                "rendered turn by turn; use data.turns: last-turn or full, or remove the turn"
            )
        for turn in turns:
            prefix = self._rendered(form, conversation, turn, prompt=True)[0]
            until = text if turn == last else self._rendered(form, conversation, turn + 1, prompt=False)[0]
            if form.role and prefix.endswith(form.prompt) and not until.startswith(prefix):
                # The prompt begins the reasoning, which this answer does not have.
                prefix = prefix.removesuffix(form.prompt) + form.role
            if turn != last and not text.startswith(until):
                until = until[: self._trimmed(form, until, (len(prefix), len(until)))[1]]
            if not until.startswith(prefix) or not text.startswith(until):
                raise self._rewritten(turn)
            spans.append((len(prefix), len(until)))
        return text, spans

    def _rendered(self, form: _Form, conversation: Conversation, end: int, *, prompt: bool) -> tuple[str, list[Span]]:
        """The text of the first `end` messages, and what the template marks in it."""
        if end == 0 and form.marks:
            return "", []
        return rendered(
            form.source,
            conversation.messages[:end],
            conversation.tools,
            self._variables,
            prompt=prompt,
            marks=form.marks,
        )

    def _trimmed(self, form: _Form, text: str, span: Span) -> Span:
        """A span without what the prompt for an answer ends with, and without white space after an end token."""
        start, stop = span
        for asks in (form.prompt, form.role):
            found = text.find(asks, max(0, start - len(asks)), start + len(asks)) if asks else -1
            if found >= 0 and start <= found + len(asks) <= stop:
                start = found + len(asks)
                break
        spoken = text[start:stop].rstrip()
        if any(map(spoken.endswith, self._ends)):
            stop = start + len(spoken)
        return start, stop

    def _rewritten(self, turn: int) -> DataError:
        return DataError(
            f"the chat template rewrites earlier turns when turn {turn + 1} is added, so the tokens of the assistant "
            "cannot be told apart; use a training version of the template (with {% generation %}), or data.turns: "
            "last-turn or full"
        )


def _common(one: str, other: str) -> str:
    """The longest text that both begin with."""
    return one[: len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))]


def _template_of(tokenizer: PreTrainedTokenizerBase, *, tools: bool) -> str:
    """The template that the tokenizer uses for a conversation with or without tools."""
    try:
        return str(tokenizer.get_chat_template(tools=[{}] if tools else None))
    except ValueError as error:
        raise ModelError(
            f"the tokenizer's chat template cannot be used: {error}; data.chat_template takes another one"
        ) from None


@cache
def _known_templates() -> dict[str, str]:
    """The templates that TRL has a training version of, and that version."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    pairs = ((path, path.with_name(path.name.replace("_training", ""))) for path in folder.glob("*_training.jinja"))
    return {own.read_text("utf-8"): path.read_text("utf-8") for path, own in pairs if own.is_file()}


def _marked(own: str) -> tuple[str, str]:
    """A template with marks, and where it is from; empty if there is none."""
    from trl.chat_template_utils import has_generation_markers

    if has_generation_markers(own):
        return own, "marks of the tokenizer's own chat template"
    # TRL's own look-up renders the template in this process, which one that loops would hold up for ever.
    if known := _known_templates().get(own):
        return known, "marks of TRL's training version of the chat template"
    return "", "the chat template rendered turn by turn"
