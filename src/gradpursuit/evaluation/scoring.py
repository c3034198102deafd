"""Scores of a model on held-out rows: loss and exact match from one pass, with little left to generate.

Exact match is that of greedy generation. The tokens it would write are known from the pass that measures the loss, up
to the first that differs from the expected answer. Only where the text so far could still become that answer (the
same text in other tokens, white space before it) is it generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradpursuit.data import Table
from gradpursuit.evaluation.answers import Question, plain_text, stop_tokens
from gradpursuit.progress import Progress
from gradpursuit.trajectory.loss import token_batches
from gradpursuit.trajectory.model import Compute, pad_id
from gradpursuit.trajectory.passes import TOKENS_PER_BATCH, Passes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPARE = 8  # tokens that an answer may take beyond those of the longest expected one


@dataclass(frozen=True)
class Scores:
    """One value per held-out row, in the order of the table.

    Attributes:
        losses: mean negative log-likelihood of the supervised tokens, in nats per token.
        matches: whether the greedy answer is the expected one, white space around it aside.
        correct: whether the right choice is the most likely one; None if that was not asked for.
    """

    losses: list[float]
    matches: list[bool]
    correct: list[bool] | None = None

    @property
    def loss(self) -> float:
        """Mean over rows."""
        return sum(self.losses) / len(self.losses)

    @property
    def exact_match(self) -> float:
        """Share of rows."""
        return sum(self.matches) / len(self.matches)

    @property
    def accuracy(self) -> float | None:
        """Share of rows, or None."""
        return None if self.correct is None else sum(self.correct) / len(self.correct)


class Scorer:
    """Scores models on held-out rows.

    Args:
        compute: device and precision.
        tokenizer: that of the rows.
        accuracy: measure multiple-choice accuracy too, of rows with `choices`.
    """

    def __init__(self, compute: Compute, tokenizer: PreTrainedTokenizerBase, *, accuracy: bool = False) -> None:
        self._compute, self._tokenizer, self._accuracy = compute, tokenizer, accuracy

    def __call__(self, model: nn.Module, rows: Table, what: str = "score") -> Scores:
        """Loss, exact match and, if asked for, accuracy of every row."""
        model.eval()
        losses, likely = self._pass(model, rows, what)
        matches = self._matches(model, rows, likely)
        correct = None
        if self._accuracy:
            from gradpursuit.evaluation.choices import choose

            correct = choose(model, rows, self._compute, self._tokenizer, what)
        return Scores(losses, matches, correct)

    def _pass(self, model: nn.Module, rows: Table, what: str) -> tuple[list[float], list[list[int]]]:
        losses, likely = [0.0] * len(rows), [[0]] * len(rows)
        with Progress(what, len(rows)) as progress:
            for indices, found in Passes(model, self._compute).scored(rows):
                for i, nll, tokens in zip(indices, found.losses().tolist(), found.likely(), strict=True):
                    losses[i], likely[i] = nll, tokens
                progress.update(len(indices))
        return losses, likely

    def _matches(self, model: nn.Module, rows: Table, likely: Sequence[list[int]]) -> list[bool]:
        questions = [Question.of(row, self._tokenizer) for row in rows]
        stops = stop_tokens(model, self._tokenizer, questions)
        known = [self._known(question, found, stops) for question, found in zip(questions, likely, strict=True)]
        open_ones = [i for i, match in enumerate(known) if match is None]
        texts = generate(model, [questions[i] for i in open_ones], self._compute, self._tokenizer)
        generated = dict(zip(open_ones, texts, strict=True))
        return [generated[i] == questions[i].text if match is None else match for i, match in enumerate(known)]

    def _known(self, question: Question, likely: list[int], stops: set[int]) -> bool | None:
        """Whether the greedy answer is the expected one, as far as the most likely tokens tell; None: not yet."""
        written: list[int] = []
        for expected, token in zip(question.answer, likely[-len(question.answer) :], strict=True):
            if token in stops:
                return plain_text(written, self._tokenizer) == question.text
            written.append(token)
            if token != expected:
                break
        # A character that is not complete yet decodes to the replacement character.
        return None if question.text.startswith(plain_text(written, self._tokenizer).rstrip("\ufffd")) else False


def generate(
    model: Any, questions: Sequence[Question], compute: Compute, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """The greedy answers to questions, without white space around them.

    An answer ends at a stop token, or when it is longer than any expected one: then it is not the expected one.
    """
    if not questions:
        return []
    stops = sorted(stop_tokens(model, tokenizer, list(questions)))
    room = max(len(question.answer) for question in questions) + _SPARE
    texts = [""] * len(questions)
    for indices in token_batches([len(question.prompt) + room for question in questions], TOKENS_PER_BATCH):
        width = max(len(questions[i].prompt) for i in indices)
        ids = torch.full((len(indices), width), pad_id(model), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, i in enumerate(indices):  # on the left, so that all answers begin at one position
            prompt = questions[i].prompt
            ids[place, width - len(prompt) :] = torch.tensor(prompt)
            mask[place, width - len(prompt) :] = 1
        with compute.precision():
            found = model.generate(
                input_ids=ids.to(compute.device),
                attention_mask=mask.to(compute.device),
                max_new_tokens=room,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=stops or None,
                pad_token_id=pad_id(model),
            )
        for place, i in enumerate(indices):
            texts[i] = plain_text(_until(found[place, width:].tolist(), set(stops)), tokenizer)
    return texts


def _until(tokens: list[int], stops: set[int]) -> list[int]:
    length = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:length]
