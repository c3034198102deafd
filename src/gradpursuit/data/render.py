"""From a conversation to tokens and labels, with the tokenizer's own chat template.

The supervised span of an assistant turn is what the template adds when that turn is appended to the rendered
prefix before it: its text and its end token, without the white space that templates put after the end token.
A token on the border (the space that ends a prompt, joined to the answer's first word) counts as the assistant's.
Rendering prefixes works with every template that renders turns in order; one that rewrites earlier turns when
later ones come is refused, because its spans could not be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradpursuit.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of a token without supervision, as everywhere in PyTorch and transformers


@dataclass(frozen=True)
class Rendered:
    """Tokens of one example: `input_ids [L]`, and `labels [L]` equal to them or -100 where not supervised."""

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """Tokens with a label that some earlier token predicts."""
        return sum(label != IGNORE for label in self.labels[1:])


class Renderer:
    """Renders conversations with one tokenizer.

    A tokenizer without a chat template renders a single prompt and completion as plain text: the prompt, the
    completion, and the end-of-sequence token.

    Raises:
        ModelError: the tokenizer gives no character offsets, or has neither a template nor an end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                f"tokenizer {type(tokenizer).__name__} gives no character offsets; a tokenizer.json is needed"
            )
        if tokenizer.chat_template is None and tokenizer.eos_token is None:
            raise ModelError("the tokenizer has neither a chat template nor an end-of-sequence token")
        self._tokenizer = tokenizer
        self._special = {tokenizer.eos_token} | {
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        }

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> Rendered:
        """Tokens and labels of one conversation; nothing is cut.

        Raises:
            DataError: the template refuses the conversation, or rewrites earlier turns.
        """
        if self._tokenizer.chat_template is None:
            text, spans = self._plain(messages)
            add_special = True
        else:
            text, spans = self._chat(messages)
            add_special = False
        encoded = self._tokenizer(text, add_special_tokens=add_special, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        labels = [
            token if any(max(begin, start) < min(end, stop) for start, stop in spans) else IGNORE
            for token, (begin, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        return Rendered(ids, labels)

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        text = self._template(messages, prompt=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prefix = self._template(messages[:index], prompt=True)
            turn = self._strip_after_end(self._template(messages[: index + 1], prompt=False))
            if not turn.startswith(prefix) or not text.startswith(turn):
                raise DataError(
                    f"the chat template rewrites earlier turns when turn {index + 1} is added, so the tokens "
                    "of the assistant cannot be told apart; use a training version of the template"
                )
            spans.append((len(prefix), len(turn)))
        return text, spans

    def _template(self, messages: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template is a program of its own, and can fail in any way
            raise DataError(f"the chat template refuses this conversation: {error}") from None
        return str(rendered)

    def _strip_after_end(self, text: str) -> str:
        stripped = text.rstrip()
        return stripped if any(token and stripped.endswith(token) for token in self._special) else text

    def _plain(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"]:
            raise DataError(
                "the tokenizer has no chat template, which only a prompt and a completion can do without; "
                f"this row has turns {roles}"
            )
        prompt = messages[0]["content"]
        text = prompt + messages[1]["content"] + str(self._tokenizer.eos_token)
        return text, [(len(prompt), len(text))]
