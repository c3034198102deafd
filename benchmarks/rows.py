"""The rows of the benchmarks: 128 BIG-bench questions with their answers, as SmolLM2 sees them.

Four tasks whose questions differ in length, in shares that make 75 tokens on average. The rows are the same every
time; `write_jsonl` hands the very same tokens and labels to programs without this package.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from gradpursuit.config import ModelSection
from gradpursuit.data import Renderer, Row
from gradpursuit.files import write_text
from gradpursuit.quickstart.assets import bigbench_tasks, cache_folder, smollm2
from gradpursuit.trajectory.model import load_tokenizer

TASKS = {  # rows of each
    "elementary_math_qa/question_only": 32,
    "navigate": 40,
    "object_counting": 8,
    "reasoning_about_colored_objects": 48,
}
SHORTEST, LONGEST = 20, 128
_SEED = 5


def build_rows() -> list[Row]:
    """128 rows of 20 to 128 tokens, in mixed order; model and data are fetched unless they are in the cache.

    Raises:
        DownloadError: they cannot be fetched.
    """
    cache = cache_folder()
    render = Renderer(load_tokenizer(ModelSection(path=str(smollm2(cache)))))
    rng = np.random.default_rng(_SEED)
    rows: list[Row] = []
    for task, content in bigbench_tasks(cache, list(TASKS)).items():
        examples = content["examples"]
        drawn = (_row(render, task, index, examples[index]) for index in rng.permutation(len(examples)).tolist())
        fitting = (row for row in drawn if SHORTEST <= len(row.input_ids) <= LONGEST)
        rows += itertools.islice(fitting, TASKS[task])
    return [rows[index] for index in rng.permutation(len(rows))]


def write_jsonl(rows: list[Row], path: Path) -> None:
    """Write `id`, `input_ids` and `labels` of every row, one JSON object a line."""
    lines = ({"id": row.id, "input_ids": row.input_ids, "labels": row.labels} for row in rows)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def answer_of(example: dict[str, Any]) -> str:
    """The choice with the highest score, or the (first) text that is wanted."""
    scores = example.get("target_scores")
    answer = max(scores, key=scores.__getitem__) if scores else example["target"]
    return (answer if isinstance(answer, str) else str(answer[0])).strip()


def _row(render: Renderer, task: str, index: int, example: dict[str, Any]) -> Row:
    answer = answer_of(example)
    messages = [{"role": "user", "content": example["input"].strip()}, {"role": "assistant", "content": answer}]
    text, rendered = json.dumps(messages), render(messages)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Row(f"{task}-{index}", digest, task, index, text, rendered.input_ids, rendered.labels)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Write the rows of the benchmarks as JSON Lines.")
    parser.add_argument("path", type=Path)
    found = build_rows()
    write_jsonl(found, parser.parse_args().path)
    lengths = [len(row.input_ids) for row in found]
    print(f"{len(found)} rows of {min(lengths)} to {max(lengths)} tokens, {np.mean(lengths):.1f} on average")
