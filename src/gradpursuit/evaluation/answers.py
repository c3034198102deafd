"""What a held-out row asks and what it expects: its last supervised span, and the tokens before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradpursuit.data import IGNORE, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A row, taken apart.

    Attributes:
        prompt: token ids before the answer.
        answer: token ids of the answer, with `end`.
        end: the special tokens that end the answer; none where the chat template writes none.
        text: the expected text, without white space around it.
    """

    prompt: list[int]
    answer: list[int]
    end: list[int]
    text: str

    @classmethod
    def of(cls, row: Row, tokenizer: PreTrainedTokenizerBase) -> Question:
        """The last supervised span of a row as the answer."""
        stop = len(row.labels)
        while row.labels[stop - 1] == IGNORE:
            stop -= 1
        start = stop
        while start > 1 and row.labels[start - 1] != IGNORE:  # nothing predicts the very first token
            start -= 1
        answer, special = row.input_ids[start:stop], set(tokenizer.all_special_ids)
        length = len(answer)
        while length and answer[length - 1] in special:
            length -= 1
        return cls(row.input_ids[:start], answer, answer[length:], plain_text(answer, tokenizer))


def plain_text(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens without special ones and without white space around it."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def stop_tokens(model: object, tokenizer: PreTrainedTokenizerBase, questions: list[Question]) -> set[int]:
    """Tokens that end a generated answer: those of the model and tokenizer, and those that end the answers."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {own} if isinstance(own, int) else set(own or ())
    found |= {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    return found | {question.end[0] for question in questions if question.end}
