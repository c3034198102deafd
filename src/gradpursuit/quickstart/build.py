"""The quickstart's pool and target, built from BIG-bench with fixed seeds.

The target is `reasoning_about_colored_objects`, a BIG-bench Hard task: lists of things are described, and the answer
is a colour, a number, yes or no. The pool holds none of it, but families that share parts of what it asks for:
counting listed objects, naming colours, following positions; and others that share nothing. Some rows are repeated,
exactly or with small edits, as pools in the wild repeat theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gradpursuit.errors import RunError
from gradpursuit.files import write_text
from gradpursuit.quickstart.assets import bigbench_tasks

TARGET = "reasoning_about_colored_objects"
POOL = (
    "arithmetic/2_digit_addition",
    "color/hex",
    "cryptonite",
    "elementary_math_qa/question_only",
    "emoji_movie",
    "navigate",
    "object_counting",
    "odd_one_out",
    "periodic_elements/subtask_0",
    "qa_wikidata",
    "unit_conversion/different_systems",
    "word_unscrambling",
)
PER_FAMILY, EXACT, NEAR = 22, 12, 12
TARGET_ROWS, HELDOUT_ROWS = 24, 48
_SEED = 20241016


def build(cache: Path, folder: Path) -> None:
    """Write `pool.jsonl`, `target.jsonl` and `heldout.jsonl` into `folder`.

    Rows have `id`, `prompt`, `completion`, `family`, and copies have `duplicate_of`. The same files every time.
    """
    tasks = bigbench_tasks(cache, [*POOL, TARGET])
    rng = np.random.default_rng(_SEED)
    pool = [row for task in POOL for row in _rows(task, tasks[task], PER_FAMILY, rng)]
    pool += _copies(pool, rng)
    pool = [pool[i] for i in rng.permutation(len(pool))]
    target = _rows(TARGET, tasks[TARGET], TARGET_ROWS + HELDOUT_ROWS, rng)
    splits = {"pool": pool, "target": target[:TARGET_ROWS], "heldout": target[TARGET_ROWS:]}
    for name, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = folder / f"{name}.jsonl"
        if not path.exists():
            write_text(path, text)
        elif path.read_bytes() != text.encode():
            raise RunError(
                f"{path}: holds other rows than those of the quickstart, and is not overwritten; move it elsewhere, or "
                "give it to `gradpursuit run` in a configuration of your own"
            )


def _rows(task: str, content: dict[str, Any], count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """`count` distinct examples of a task, drawn at random."""
    name, seen, rows = task.replace("/", "-"), set(), []
    examples = content["examples"]
    for index in rng.permutation(len(examples)).tolist():
        prompt = (content.get("task_prefix") or "") + examples[index]["input"].strip()
        if prompt in seen:
            continue
        seen.add(prompt)
        family = task.split("/")[0]
        row = {"id": f"{name}-{index}", "prompt": prompt, "completion": _answer(examples[index]), "family": family}
        rows.append(row)
        if len(rows) == count:
            break
    return rows


def _answer(example: dict[str, Any]) -> str:
    """The target text: the best-scored choice, or the first of the accepted answers."""
    scores = example.get("target_scores")
    if scores:
        return max(scores, key=scores.__getitem__).strip()
    target = example["target"]
    return str(target[0] if isinstance(target, list) else target).strip()


def _copies(pool: list[dict[str, Any]], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Exact copies of some rows, and edited ones of others: another opening, no final punctuation."""
    chosen = rng.permutation(len(pool))[: EXACT + NEAR].tolist()
    for number, index in enumerate(chosen):
        row = pool[index]
        kind = "exact" if number < EXACT else "near"
        prompt = row["prompt"] if kind == "exact" else f"Question: {row['prompt'].rstrip(' .?!')}"
        yield {**row, "id": f"{row['id']}-{kind}", "prompt": prompt, "duplicate_of": row["id"]}
