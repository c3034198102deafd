"""Multiple-choice accuracy by log-likelihood, judged by `lm-eval` on a local task made of the held-out rows.

The harness makes the requests and scores them; the log-likelihoods come from the same pass that measures the loss, in
the very form the model is trained on: the prompt as it was rendered, then the choice and its end token.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from gradpursuit.data import IGNORE, Row, Table
from gradpursuit.errors import ConfigError, DataError
from gradpursuit.evaluation.answers import Question
from gradpursuit.progress import Progress
from gradpursuit.trajectory.model import Compute
from gradpursuit.trajectory.passes import Passes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_choices(rows: Table, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse what :func:`choose` could not judge.

    Raises:
        ConfigError: `lm-eval` is not installed.
        DataError: a row has no `choices`, or they do not hold its answer.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"evaluation.accuracy needs lm-eval, which cannot be imported ({error}): pip install 'gradpursuit[eval]', "
            "or set evaluation.accuracy: false (loss and exact match need nothing more)"
        ) from None
    for row in rows:
        _choices(row, Question.of(row, tokenizer), where)


def choose(
    model: nn.Module, rows: Table, compute: Compute, tokenizer: PreTrainedTokenizerBase, what: str
) -> list[bool]:
    """Whether the right choice is the most likely one, for every row.

    Raises:
        DataError: as :func:`check_choices`.
    """
    from lm_eval.evaluator import evaluate

    questions = [Question.of(row, tokenizer) for row in rows]
    documents = [
        {"row": i, "choices": choices, "gold": choices.index(question.text)}
        for i, (row, question) in enumerate(zip(rows, questions, strict=True))
        for choices in [_choices(row, question, "held-out rows")]
    ]
    with _quiet_harness():
        harness = _likelihoods(model, questions, compute, tokenizer, what)
        found: Any = evaluate(harness, {"held-out": _task(documents)}, bootstrap_iters=0, log_samples=True)
    samples = {sample["doc"]["row"]: bool(sample["acc"]) for sample in found["samples"]["held-out"]}
    return [samples[i] for i in range(len(rows))]


def _choices(row: Row, question: Question, where: str) -> list[str]:
    choices = row.columns.get("choices")
    texts = choices if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices) else []
    stripped = [choice.strip() for choice in texts]
    if question.text not in stripped or not 1 < len(set(stripped)) == len(stripped) or "" in stripped:
        raise DataError(
            f"{row.where}: evaluation.accuracy needs a column 'choices' of different texts, one of them "
            f"the answer {question.text!r:.60}; found {choices!r:.80} ({where}); add it, or set evaluation.accuracy: "
            "false"
        )
    return stripped


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Its words and its progress bar of the questions; scoring shows its own."""
    from lm_eval.api import task

    known: Any = task
    level, bar = logging.getLogger("lm_eval").level, known.tqdm
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logging.getLogger("lm_eval").setLevel(level)
        known.tqdm = bar


def _task(documents: list[dict[str, Any]]) -> Any:
    import datasets
    from lm_eval.api.task import ConfigurableTask

    data = datasets.DatasetDict({"test": datasets.Dataset.from_list(documents)})
    return ConfigurableTask(
        config={
            "task": "held-out",
            "custom_dataset": lambda **_: data,
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": lambda doc: str(doc["row"]),
            "doc_to_choice": lambda doc: doc["choices"],
            "doc_to_target": lambda doc: doc["gold"],
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    )


def _likelihoods(
    model: nn.Module, questions: list[Question], compute: Compute, tokenizer: PreTrainedTokenizerBase, what: str
) -> Any:
    """A model of the harness whose contexts are numbers of questions."""
    from lm_eval.api.model import LM

    class Likelihoods(LM):
        """Log-likelihoods of choices as answers."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """`(log-likelihood, whether it is the greedy answer)` of every (question, choice)."""
            pairs = [request.args for request in requests]
            rows = [_answered(questions[int(number)], choice, tokenizer) for number, choice in pairs]
            found, groups = np.zeros(len(rows)), defaultdict(list)
            for index, (number, _choice) in enumerate(pairs):
                groups[number].append(index)  # what they share is computed once
            with Progress(f"{what}, choices", len(rows)) as progress:
                for indices, said in Passes(model, compute).scored(rows, list(groups.values())):
                    found[indices] = -(said.losses().double() * said.tokens).cpu().numpy()
                    progress.update(len(indices))
            return [(value, False) for value in found.tolist()]

        def loglikelihood_rolling(self, requests: list[Any]) -> Any:
            """Not needed."""
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> Any:
            """Not needed."""
            raise NotImplementedError

    return Likelihoods()


def _answered(question: Question, choice: str, tokenizer: PreTrainedTokenizerBase) -> Row:
    """The row in which `choice` is the answer: tokens as rendering the conversation with it gives them."""
    prompt = str(tokenizer.decode(question.prompt, clean_up_tokenization_spaces=False))
    encoded = tokenizer(prompt + choice, add_special_tokens=False, return_offsets_mapping=True)
    ids = [*encoded["input_ids"], *question.end]
    labels = [
        token if stop > len(prompt) else IGNORE
        for token, (_start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return Row("", "", "", 0, "{}", ids, labels + question.end)
