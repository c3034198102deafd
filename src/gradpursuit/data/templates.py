"""Where in the rendered text of a conversation the assistant speaks.

A chat template that marks it with `{% generation %}` is asked. Of the families whose own template does not, TRL ships
training versions that do, and those are used instead: the same text but for what TRL's page of templates says (the
training version of Qwen 3 keeps the reasoning block of every turn). For any other template the conversation is
rendered up to every assistant turn and on to its end, which works with templates that render turns in order; one that
rewrites earlier turns when later ones come is refused, because its spans could not be trusted.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpursuit.data.completeness import Marked
from gradpursuit.data.reasoning import REASONING
from gradpursuit.data.schemas import Conversation
from gradpursuit.data.template_process import Request, Span, check_template, rendered
from gradpursuit.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("gradpursuit")
# Keys of a message that are looked at elsewhere, or that only number it.
_KNOWN = {
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "id",
    "weight",
    "train",
    "tools",
    "functions",
    *REASONING,
}


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


@dataclass(frozen=True)
class Asked:
    """A conversation to be rendered.

    Attributes:
        conversation: what the row says.
        turns: positions of the messages that are supervised.
        needed: positions of those whose reasoning has to come through.
    """

    conversation: Conversation
    turns: Sequence[int]
    needed: Sequence[int]


@dataclass
class _Plan:
    """What has to be rendered of one conversation, and what came of it.

    Attributes:
        form: the template.
        conversation: as the template is to have it.
        asked: what was asked for.
        marked: the conversation with marks in it.
        texts: what was rendered, or why not, by the number of messages and whether the text asks for an answer.
        seen: the same of the marked conversation.
    """

    form: _Form
    conversation: Conversation
    asked: Asked
    marked: Marked
    texts: dict[tuple[int, bool], tuple[str, list[Span]] | DataError] = field(default_factory=dict)
    seen: tuple[str, list[Span]] | DataError = ("", [])

    @property
    def parts(self) -> list[tuple[int, bool]]:
        """What of the conversation has to be rendered: the whole, and what tells where its turns begin and end."""
        whole, turns = len(self.conversation.messages), self.asked.turns
        parts = [(whole, False)]
        if not self.form.marks:
            parts += [part for turn in turns for part in ((turn, True), (turn + 1, False))]
        elif list(turns) != self.speaking:
            parts += [part for turn in turns for part in ((turn, True), (turn + 1, True))]
        return [(end, prompt) for end, prompt in dict.fromkeys(parts) if end and (end < whole or not prompt)]

    @property
    def speaking(self) -> list[int]:
        """Positions of the assistant's messages."""
        return [i for i, message in enumerate(self.conversation.messages) if message["role"] == "assistant"]

    def text(self, end: int, *, prompt: bool = False) -> tuple[str, list[Span]]:
        """The text of the first `end` messages, and what the template marks in it.

        Raises:
            DataError: the template refuses them.
        """
        found = self.texts[end, prompt] if end else ("", [])
        if isinstance(found, DataError):
            raise found
        return found


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

    def render(self, conversations: Sequence[Asked]) -> list[tuple[str, list[Span]] | DataError]:
        """The whole text of each, and where in it the assistant speaks in the turns asked for: text and end token.

        What the template puts before an answer when it asks for one, and white space after an end token, are no part
        of a span. A special token that both the row and the template write at the same place is written once. Instead
        of a text there is an error where the template refuses the conversation, leaves out a part of it, or rewrites
        earlier turns.

        Raises:
            ModelError: the template takes too long, or too much memory, or cannot be used.
        """
        plans = list(map(self._planned, conversations))
        by_form: dict[str, list[_Plan]] = defaultdict(list)
        for plan in plans:
            by_form[plan.form.source].append(plan)
        for source, group in by_form.items():
            requests = []
            for plan in group:
                whole, marked = plan.conversation, plan.marked.conversation
                requests += [
                    Request(whole.messages, whole.tools, plan.parts),
                    Request(marked.messages, marked.tools, [(len(marked.messages), False)]),
                ]
            texts = rendered(source, requests, self._variables, marks=group[0].form.marks)
            for plan in group:
                plan.texts.update((part, next(texts)) for part in plan.parts)
                plan.seen = next(texts)
        return list(map(self._found, plans))

    def _planned(self, asked: Asked) -> _Plan:
        form = self._form(_template_of(self._tokenizer, tools=bool(asked.conversation.tools)))
        self._warn_of_unread_keys(asked.conversation, form)
        conversation = self._once(asked.conversation, form)
        return _Plan(form, conversation, asked, Marked(conversation, form.source))

    def _found(self, plan: _Plan) -> tuple[str, list[Span]] | DataError:
        try:
            self._refuse_left_out(plan)
            text, spans = self._by_marks(plan) if plan.form.marks else self._by_prefixes(plan)
            return text, [self._trimmed(plan.form, text, span) for span in spans]
        except DataError as error:
            return error

    def _form(self, own: str) -> _Form:
        if own not in self._forms:
            marked, _ = _marked(own)
            self._forms[own] = self._explored(_Form(marked or own, bool(marked)))
        return self._forms[own]

    def _explored(self, form: _Form) -> _Form:
        """The form, with what it writes around an answer."""
        user, answer = {"role": "user", "content": "x7z"}, "q0z"
        messages = (user, {"role": "assistant", "content": answer})
        request = Request(messages, parts=((1, False), (1, True), (2, False)))
        found = [
            made[0] for made in rendered(form.source, [request], self._variables) if not isinstance(made, DataError)
        ]
        if len(found) < len(request.parts):  # a template that does not take these messages may well take those of data
            return form
        without, with_prompt, text = found
        asking = len(_common(without, with_prompt))
        prompt = with_prompt[asking:]
        head, answered, tail = text.partition(answer)
        role = _common(prompt, head[asking:]) if answered else ""
        begin = str(self._tokenizer.bos_token or "")
        ends = [end for end in self._ends if answered and tail.lstrip().startswith(end)]
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

    @staticmethod
    def _refuse_left_out(plan: _Plan) -> None:
        """See that all that the row says came through.

        Raises:
            DataError: naming the first that did not; or the template refuses the conversation.
        """
        plan.text(len(plan.conversation.messages))
        if isinstance(plan.seen, DataError):
            raise plan.seen
        if lost := plan.marked.left_out(plan.seen[0], set(plan.asked.needed)):
            raise DataError(lost)

    def _by_marks(self, plan: _Plan) -> tuple[str, list[Span]]:
        text, spans = plan.text(len(plan.conversation.messages))
        if list(plan.asked.turns) == plan.speaking:
            return text, spans
        chosen: list[Span] = []
        for turn in plan.asked.turns:
            before = plan.text(turn, prompt=True)[1]
            until = spans if turn == plan.speaking[-1] else plan.text(turn + 1, prompt=True)[1]
            if until != spans[: len(until)] or before != until[: len(before)]:
                raise self._rewritten(turn)
            chosen += until[len(before) :]
        return text, chosen

    def _by_prefixes(self, plan: _Plan) -> tuple[str, list[Span]]:
        form, turns = plan.form, plan.asked.turns
        last = len(plan.conversation.messages) - 1
        text, spans = plan.text(last + 1)[0], []
        if turns and turns[0] == 0:
            raise DataError(
                "the conversation begins with an assistant turn, whose start cannot be found where templates are "
                "rendered turn by turn; use data.turns: last-turn or full, or remove the turn"
            )
        for turn in turns:
            prefix, until = plan.text(turn, prompt=True)[0], plan.text(turn + 1)[0]
            if form.role and prefix.endswith(form.prompt) and not until.startswith(prefix):
                # The prompt begins the reasoning, which this answer does not have.
                prefix = prefix.removesuffix(form.prompt) + form.role
            if turn != last and not text.startswith(until):
                until = until[: self._trimmed(form, until, (len(prefix), len(until)))[1]]
            if not until.startswith(prefix) or not text.startswith(until):
                raise self._rewritten(turn)
            spans.append((len(prefix), len(until)))
        return text, spans

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
