from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradpursuit.data import Renderer, Row, Table
from gradpursuit.errors import ConfigError, DataError
from gradpursuit.evaluation.answers import Question
from gradpursuit.evaluation.choices import _answered, check_choices
from gradpursuit.evaluation.scoring import Scorer
from questions import FLOAT32, rows

CHOICES = ("apple", "zebra crossing", "an apple a day", "no")


def with_choices(tokenizer: PreTrainedTokenizerBase, count: int) -> Table:
    renderer, made = Renderer(tokenizer), []
    for i in range(count):
        answer = CHOICES[i % len(CHOICES)]
        rendered = renderer([{"role": "user", "content": f"Which one? {i}"}, {"role": "assistant", "content": answer}])
        columns = json.dumps({"choices": [f" {choice}" for choice in CHOICES]})
        made.append(Row(str(i), str(i), "held.jsonl", i + 1, columns, rendered.input_ids, rendered.labels))
    return Table(made)


def test_the_right_choice_is_tokenized_as_it_was_rendered(tokenizer: PreTrainedTokenizerBase) -> None:
    for row in with_choices(tokenizer, 4):
        question = Question.of(row, tokenizer)
        made = _answered(question, question.text, tokenizer)
        length = len(made.input_ids)
        assert made.input_ids == row.input_ids[:length]
        assert made.labels == row.labels[:length]
        assert set(row.labels[length:]) <= {-100}


def test_accuracy_is_that_of_the_likeliest_choice(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """By a plain forward pass of every conversation."""
    pytest.importorskip("lm_eval")
    table, renderer, wanted = with_choices(tokenizer, 6), Renderer(tokenizer), []
    for i in range(6):
        found = []
        for choice in CHOICES:
            rendered = renderer(
                [{"role": "user", "content": f"Which one? {i}"}, {"role": "assistant", "content": choice}]
            )
            loss = base(
                input_ids=torch.tensor([rendered.input_ids]), labels=torch.tensor([rendered.labels])
            ).loss.item()
            found.append(loss * rendered.supervised)
        wanted.append(found.index(min(found)) == i % len(CHOICES))
    scores = Scorer(FLOAT32, tokenizer, accuracy=True)(base, table)
    assert scores.correct == wanted
    assert scores.accuracy == sum(wanted) / 6
    assert any(wanted)
    assert not all(wanted)


def test_what_accuracy_needs_is_told_before_anything_is_trained(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = with_choices(tokenizer, 4)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(ConfigError, match=r"evaluation.accuracy needs lm-eval.*pip install 'gradpursuit\[eval\]'"):
            check_choices(table, tokenizer, "target 'own'")
    monkeypatch.setitem(sys.modules, "lm_eval", json)  # any module: what is there is not used here
    check_choices(table, tokenizer, "target 'own'")
    for columns in ({}, {"choices": ["apple"]}, {"choices": ["pear", "plum"]}, {"choices": ["apple", "apple", "no"]}):
        bad = Table([replace(table[0], original=json.dumps(columns))])
        with pytest.raises(DataError, match=r"held\.jsonl:1: evaluation.accuracy needs a column 'choices'.*'own'"):
            check_choices(bad, tokenizer, "target 'own'")
    with pytest.raises(DataError):
        check_choices(rows(tokenizer, "apple", 1), tokenizer, "target 'own'")
