from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradpursuit.data import IGNORE, Row, Table
from gradpursuit.evaluation.answers import Question
from gradpursuit.evaluation.scoring import Scorer, generate
from gradpursuit.trajectory.training import TrainSpec, train
from questions import FLOAT32, rows


def plainly(model: PreTrainedModel, question: Question, tokenizer: PreTrainedTokenizerBase) -> str:
    """Greedy decoding without a cache, one token after the other."""
    ids = list(question.prompt)
    for _ in range(len(question.answer) + 8):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[len(question.prompt) :], skip_special_tokens=True).strip()


@pytest.fixture
def trained(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model that has learned some answers and not others."""
    base.requires_grad_(True)
    learned = rows(tokenizer, "apple", 9)
    train(base, list(learned), TrainSpec(60, 9, 1e-2, 0, "learn"), FLOAT32)
    return base


def answered(row: Row, tokens: list[int]) -> Row:
    """The row with other answer tokens before its end token."""
    start = next(i for i, label in enumerate(row.labels) if label != IGNORE)
    ids = [*row.input_ids[:start], *tokens, row.input_ids[-2]]
    return replace(row, input_ids=ids, labels=[IGNORE] * start + ids[start:])


def test_a_row_is_taken_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    row = rows(tokenizer, "apple", 3)[2]
    question = Question.of(row, tokenizer)
    assert question.text == "apple apple apple"
    assert question.end == [tokenizer.eos_token_id]
    assert tokenizer.decode(question.prompt).endswith("assistant\n")
    assert question.prompt + question.answer == row.input_ids[: len(question.prompt + question.answer)]


def test_losses_are_the_models_own(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    table = rows(tokenizer, "apple", 9)
    own = [
        base(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item() for row in table
    ]
    found = Scorer(FLOAT32, tokenizer)(base, table)
    assert found.losses == pytest.approx(own, rel=1e-5)
    assert found.loss == pytest.approx(np.mean(own), rel=1e-5)
    assert found.correct is None
    assert found.accuracy is None


def test_exact_match_is_that_of_plain_greedy_decoding(
    trained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    table = Table([*rows(tokenizer, "apple", 9), *rows(tokenizer, "zebra", 4)])
    questions = [Question.of(row, tokenizer) for row in table]
    wanted = [plainly(trained, question, tokenizer) for question in questions]
    matches = [text == question.text for text, question in zip(wanted, questions, strict=True)]
    assert 0 < sum(matches) < len(matches), "the model must have learned some answers and not others"
    found = Scorer(FLOAT32, tokenizer)(trained, table)
    assert found.matches == matches
    assert found.exact_match == sum(matches) / len(matches)
    assert generate(trained, questions, FLOAT32, tokenizer) == wanted


def test_the_same_text_in_other_tokens_is_a_match(trained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model writes 'apple' in its usual tokens; the row expects it letter by letter."""
    row = rows(tokenizer, "apple", 1)[0]
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "apple"]
    assert tokenizer.decode(letters) == "apple"
    other = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "apply"]
    table = Table([row, answered(row, letters), answered(row, other)])
    assert Question.of(table[1], tokenizer).text == "apple"
    assert Scorer(FLOAT32, tokenizer)(trained, table).matches == [True, True, False]
