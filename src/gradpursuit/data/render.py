"""From what a row says to tokens and labels.

A conversation is rendered by the tokenizer's own chat template (:mod:`gradpursuit.data.templates`). Supervised is, by
the mode,

* `assistant`: the text and the end token of every assistant turn,
* `last-turn`: those of the last one alone,
* `full`: every token.

Assistant turns in a list of messages that is a row's *prompt* are context, and an assistant turn without text and
without a tool call is rendered but not supervised: nothing is learned from an answer that is not there. So are turns
that the row marks as not to be learned (`Conversation.untrained`). What system,
user and tool messages say is never supervised but in mode `full`. Keys such as `name`, `tool_calls` and `tool_call_id`
go to the template as they are; a template that has no place for a message, a tool call or a tool refuses the row. Plain
text is supervised whole, with an end-of-sequence token. A token on the border (the space that ends a prompt, joined to
the answer's first word) counts as the assistant's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from gradpursuit.config import Turns
from gradpursuit.data.dropped import TOO_LONG
from gradpursuit.data.lengths import Bound
from gradpursuit.data.limits import Limits
from gradpursuit.data.reasoning import REASONING
from gradpursuit.data.schemas import Conversation
from gradpursuit.data.template_file import template_source
from gradpursuit.data.templates import Asked, ChatTemplate, Span
from gradpursuit.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CUT = ("</", "[/", "<|", "/think")  # the end of reasoning, which a template may leave out of earlier turns
IGNORE = -100  # the label of a token without supervision, as everywhere in PyTorch and transformers


@dataclass(frozen=True)
class Rendered:
    """Tokens of one example: `input_ids [L]`, `labels [L]` equal to them or -100 where not supervised, and its text."""

    input_ids: list[int]
    labels: list[int]
    text: str = ""

    @property
    def supervised(self) -> int:
        """Tokens with a label that some earlier token predicts."""
        return len(self.labels[1:]) - self.labels[1:].count(IGNORE)


@dataclass(frozen=True)
class _Text:
    """What is to be tokenized, where in it the supervised characters are, and who adds the special tokens."""

    text: str
    spans: list[Span]
    add_special: bool


class Renderer:
    """Renders conversations and plain text with one tokenizer.

    A tokenizer without a chat template renders a single prompt and completion as plain text: the prompt, the
    completion, and the end-of-sequence token.

    Args:
        tokenizer: a fast one.
        turns: what is supervised.
        template_variables: for the chat template, beside the conversation.
        limits: of the model that is to read the rows, kept as `limits`; None: none.
        chat_template: a file with one, or the text of one, instead of the tokenizer's own.

    Raises:
        ConfigError: the chat template that was given cannot be read or parsed.
        ModelError: the tokenizer gives no character offsets, or has neither a template nor an end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        turns: Turns = "assistant",
        template_variables: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        chat_template: str | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"tokenizer {type(tokenizer).__name__} gives no character offsets; a tokenizer.json is needed"
            )
        if chat_template is not None:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = template_source(chat_template)
        if not tokenizer.chat_template and tokenizer.eos_token is None:
            raise ModelError(
                "the tokenizer has neither a chat template nor an end-of-sequence token; data.chat_template takes one"
            )
        self._tokenizer, self._turns, self.limits = tokenizer, turns, limits or Limits()
        self._template = (
            ChatTemplate(tokenizer, template_variables or {}, chat_template) if tokenizer.chat_template else None
        )

    @cached_property
    def _bound(self) -> Bound:
        return Bound(self._tokenizer)

    def _is_longer(self, conversation: Conversation, at_most: int) -> bool:
        """Whether what must come through the template has more than `at_most` tokens for certain, or is refused."""
        if conversation.text is not None:
            texts = [conversation.text]
        else:
            said = [message["content"].strip() for message in conversation.messages]
            texts = [text for text in said if not any(mark in text for mark in _CUT)]
        return sum(map(len, texts)) > at_most and sum(map(self._bound.of, texts)) > at_most

    def name(self, token: int) -> str:
        """How the tokenizer spells a token."""
        return str(self._tokenizer.convert_ids_to_tokens(token))

    @property
    def masks(self) -> str:
        """In words, how the supervised tokens are found."""
        return self._template.origin if self._template else "no chat template: prompt, completion and end token"

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> Rendered:
        """Tokens and labels of one list of messages; nothing is cut.

        Raises:
            DataError: the template refuses the conversation, or its supervised tokens cannot be told.
        """
        (found,) = self.many([Conversation(tuple(messages))])
        if isinstance(found, DataError):
            raise found
        return found

    def many(self, conversations: Sequence[Conversation], at_most: int | None = None) -> list[Rendered | DataError]:
        """Tokens and labels of each, or why there are none; many at a time are tokenized faster than one by one.

        A text that has more than `at_most` tokens for certain is not tokenized: what a text of megabytes would cost.
        """
        texts = self._texts(conversations, at_most)
        found: list[Rendered | DataError] = [
            text if isinstance(text, DataError) else Rendered([], []) for text in texts
        ]
        for add_special in (False, True):
            chosen = [
                (i, text) for i, text in enumerate(texts) if isinstance(text, _Text) and text.add_special == add_special
            ]
            if not chosen:
                continue
            encoded = self._tokenizer(
                [text.text for _, text in chosen],
                add_special_tokens=add_special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_special_tokens_mask=True,
            )
            columns = (encoded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
            for (i, text), ids, offsets, added in zip(chosen, *columns, strict=True):
                labels = self._labels(ids, offsets, text.spans)
                if add_special:
                    ids, labels = self._once(ids, labels, added)
                found[i] = Rendered(ids, labels, text.text)
        return found

    def _texts(self, conversations: Sequence[Conversation], at_most: int | None) -> list[_Text | DataError]:
        """What is to be tokenized of each, or why nothing is."""
        asked = [self._asked(conversation, at_most) for conversation in conversations]
        of_template = [one for one in asked if isinstance(one, Asked)]
        rendered = iter(self._template.render(of_template) if self._template else ())
        texts: list[_Text | DataError] = []
        for one in asked:
            text = next(rendered) if isinstance(one, Asked) else one
            if isinstance(text, tuple):
                text = _Text(text[0], [(0, len(text[0]))] if self._turns == "full" else text[1], False)
            if isinstance(text, _Text) and at_most is not None:
                long = len(text.text) > at_most and self._bound.of(text.text) > at_most
                text = DataError(TOO_LONG) if long else text
            texts.append(text)
        return texts

    def _once(self, ids: list[int], labels: list[int], added: Sequence[int]) -> tuple[list[int], list[int]]:
        """Plain text without the special tokens that the tokenizer added to those that stand in it already.

        A beginning that stands in the text is not supervised, as one that the tokenizer adds is not. The end is written
        by us, so that it is supervised.
        """
        begin, end = added.index(0) if 0 in added else len(ids), len(ids)
        while end > begin and added[end - 1]:
            end -= 1
        body = ids[begin:end]
        written = 1 if body and ids[begin] == self._tokenizer.bos_token_id else 0
        if body and not written and self._tokenizer.bos_token_id is None and begin and ids[begin] == ids[begin - 1]:
            written = 1
        head = [token for token in ids[:begin] if not written or token != body[0]]
        tail = [token for token in ids[end:] if not body or token != body[-1]]
        ignored = [IGNORE] * len(head) + [IGNORE] * written + labels[begin + written : end] + [IGNORE] * len(tail)
        return head + body + tail, ignored

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _asked(self, conversation: Conversation, at_most: int | None) -> Asked | _Text | DataError:
        """What the chat template is to render; the text, where there is none; or why the row cannot be used."""
        full = self._turns == "full"
        try:
            if at_most is not None and self._is_longer(conversation, at_most):
                raise DataError(TOO_LONG)
            if conversation.text is not None:
                text = self._ended(self._begun(conversation.text))
                return _Text(text, [(0, len(text))], True)
            if full and conversation.untrained:
                raise DataError(
                    f"turn {min(conversation.untrained) + 1} is marked as not to be learned, but data.turns: full "
                    "supervises every token; use data.turns: assistant or last-turn"
                )
            turns = [] if full else self._supervised(conversation)
            if self._template:
                return Asked(conversation, turns, range(len(conversation.messages)) if full else turns)
            text, spans = self._without_template(conversation, turns)
            return _Text(text, [(0, len(text))] if full else spans, True)
        except DataError as error:
            return error

    def _supervised(self, conversation: Conversation) -> list[int]:
        """Positions of the messages that are supervised.

        Raises:
            DataError: the row excludes all of them itself.
        """
        messages = conversation.messages
        speaking = [i for i in range(conversation.first, len(messages)) if messages[i]["role"] == "assistant"]
        if self._turns == "last-turn":
            speaking = speaking[-1:]
        learned = [i for i in speaking if i not in conversation.untrained]
        if speaking and not learned:
            which = "the last assistant turn" if self._turns == "last-turn" else "every assistant turn"
            raise DataError(f"{which} is marked as not to be learned (as by weight: 0 or train: false)")
        return [i for i in learned if messages[i]["content"].strip() or _says_more(messages[i])]

    @staticmethod
    def _labels(ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[int]:
        begins, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        for start, stop in spans:
            inside = np.maximum(begins, start) < np.minimum(ends, stop)
            labels[inside] = np.asarray(ids, dtype=np.int64)[inside]
        return list(labels.tolist())

    def _without_template(self, conversation: Conversation, turns: Sequence[int]) -> tuple[str, list[Span]]:
        messages = conversation.messages
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"] or _says_more(messages[1]) or conversation.tools:
            raise DataError(
                "the tokenizer has no chat template, which only a prompt and a completion can do without; "
                f"this row has {_turns_in_words(conversation, roles)}; set data.chat_template to a template (a file or "
                "the text of one)"
            )
        prompt, completion, begin = (
            self._begun(messages[0]["content"]),
            messages[1]["content"],
            self._tokenizer.bos_token,
        )
        if not prompt:
            completion = self._begun(completion)
        elif begin and begin != self._tokenizer.eos_token:
            completion = completion.removeprefix(str(begin))  # the text begins at the prompt
        text = prompt + self._ended(completion)
        return text, [(len(prompt), len(text))] if turns else []

    def _begun(self, text: str) -> str:
        """A text with no more than one beginning, and no white space before it."""
        begin, said = str(self._tokenizer.bos_token or ""), text.lstrip()
        if not begin or not said.startswith(begin):
            return text
        while said.startswith(2 * begin):
            said = said.removeprefix(begin)
        return said

    def _ended(self, text: str) -> str:
        """A text with one end token, and no white space after it: one that stands there already is not repeated."""
        end, said = max(filter(text.rstrip().endswith, self._ends), key=len, default=""), text.rstrip()
        if not end:
            return text + str(self._tokenizer.eos_token or "")
        while said.endswith(2 * end):
            said = said.removesuffix(end)
        return said

    @cached_property
    def _ends(self) -> list[str]:
        """Special tokens that may end a text: all but those that begin one, or stand for something within it."""
        tokenizer = self._tokenizer
        others = {tokenizer.bos_token, tokenizer.unk_token, tokenizer.mask_token} - {tokenizer.eos_token}
        special = (token for token in tokenizer.added_tokens_decoder.values() if token.special)
        return [str(token) for token in (tokenizer.eos_token, *special) if token and str(token) not in others]


def _turns_in_words(conversation: Conversation, roles: list[str]) -> str:
    if roles == ["user", "assistant"]:
        return "tools" if conversation.tools else "tool calls or reasoning"
    return f"turns {roles}"


def _says_more(message: Mapping[str, Any]) -> bool:
    """Whether the assistant says something beside its text: a tool call, or its reasoning."""
    return any(message.get(name) for name in ("tool_calls", *REASONING))
