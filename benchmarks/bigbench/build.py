"""Build the pool and the targets of the benchmark from BIG-bench, the same bytes every time.

    python benchmarks/bigbench/build.py FOLDER [--size tiny|standard|large]

FOLDER gets `pool.jsonl`, for each target `<name>.target.jsonl` and `<name>.heldout.jsonl`, and `built.json` with what
was built and its sha256. Rows have `id`, `prompt`, `completion`, `family`; targets with choices have `choices`; copies
have `duplicate_of`, which nothing that selects ever reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradpursuit.config import ModelSection
from gradpursuit.data import Renderer
from gradpursuit.data.leakage import Leaks, Protected
from gradpursuit.data.schemas import Conversation
from gradpursuit.errors import DataError
from gradpursuit.files import sha256_of, write_json, write_text
from gradpursuit.quickstart.assets import bigbench_tasks, cache_folder, smollm2
from gradpursuit.trajectory.model import load_tokenizer

FAMILIES = json.loads((Path(__file__).parent / "families.json").read_text("utf-8"))
IN_DOMAIN = "in-domain"
MAX_TOKENS = 96  # of a row as it is rendered for the model
SPARE = 3  # times as many rows are drawn as are held out: some of the others hold their text
_SEED = 20241016


@dataclass(frozen=True)
class Size:
    """How much to build: distinct pool rows, rows of each target, held-out rows of each, targets, development ones."""

    pool: int
    target: int
    heldout: int
    targets: int
    development: int

    @property
    def rows(self) -> int:
        """Pool rows with their copies."""
        return self.pool + 2 * (self.pool // 10)


SIZES = {
    "tiny": Size(200, 16, 24, 2, 1),
    "standard": Size(4_000, 48, 100, 6, 4),
    "large": Size(20_000, 48, 100, 6, 4),
}


def build(folder: Path, size: Size) -> dict[str, Any]:
    """Write all files and return the record of `built.json`.

    Raises:
        DataError: BIG-bench holds fewer usable rows than are wanted.
    """
    cache = cache_folder()
    tokenizer = load_tokenizer(ModelSection(path=str(smollm2(cache))))
    source = Source(cache, Renderer(tokenizer))
    targets, development = FAMILIES["targets"][: size.targets], FAMILIES["development"][: size.development]
    # What scores in-domain is drawn with the pool and then taken out of it: other rows, the same distribution.
    rows = source.mixture(FAMILIES["pool"], size.pool + SPARE * size.heldout)
    rng = np.random.default_rng([_SEED, 0])
    rows = [rows[i] for i in rng.permutation(len(rows))]
    heldout, pool = rows[: size.heldout], without_leaks(rows[size.heldout :], rows[: size.heldout], size.pool)
    copies = list(_copies(pool, rng))
    files = {
        "pool": [(pool + copies)[i] for i in rng.permutation(len(pool) + len(copies))],
        f"{IN_DOMAIN}.heldout": heldout,
    }
    for name in [*targets, *development]:
        rows = source.rows([name], size.target + SPARE * size.heldout)
        heldout, others = rows[: size.heldout], rows[size.heldout :]
        files[f"{name}.target"], files[f"{name}.heldout"] = without_leaks(others, heldout, size.target), heldout
    for name, content in files.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in content]
        write_text(folder / f"{name}.jsonl", "".join(lines))
    record = {
        "size": asdict(size),
        "targets": targets,
        "development": development,
        "families": len({row["family"] for row in pool}),
        "rows": {name: len(content) for name, content in files.items()},
        "exact": sum(row["id"].endswith("-exact") for row in copies),
        "near": sum(row["id"].endswith("-near") for row in copies),
        "sha256": {name: sha256_of(folder / f"{name}.jsonl") for name in files},
    }
    write_json(folder / "built.json", record)
    return record


def without_leaks(rows: list[dict[str, Any]], heldout: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first `count` rows that hold no text of a held-out one: what a run would leave out is not built.

    Raises:
        DataError: there are fewer.
    """
    leaks = Leaks([_protected(row) for row in heldout])
    found = [row for row in rows if not leaks.find((own := _protected(row)).hash, own.conversation)][:count]
    if len(found) < count:
        raise DataError(f"{heldout[0]['family']}, ...: {len(found)} usable rows beside held-out ones, {count} wanted")
    return found


def _protected(row: dict[str, Any]) -> Protected:
    said = _messages(row["prompt"], row["completion"])
    return Protected(row["id"], f"{row['prompt']}\n{row['completion']}", Conversation(said))


def _messages(prompt: str, answer: str) -> tuple[dict[str, str], ...]:
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}


class Source:
    """Usable rows of BIG-bench tasks: distinct prompts, short enough, in a random order that is always the same."""

    def __init__(self, cache: Path, renderer: Renderer) -> None:
        names = [
            *FAMILIES["targets"],
            *FAMILIES["development"],
            *(t for tasks in FAMILIES["pool"].values() for t in tasks),
        ]
        self._tasks, self._renderer = bigbench_tasks(cache, names), renderer

    def mixture(self, families: dict[str, list[str]], count: int) -> list[dict[str, Any]]:
        """`count` rows, from every family as many as from any other that has enough."""
        quotas = dict.fromkeys(families, 0)
        left, open_ones, found = count, list(families), {}
        while left and open_ones:
            share = max(1, left // len(open_ones))
            for family in list(open_ones)[:left] if share == 1 else list(open_ones):
                wanted = quotas[family] + min(share, left)
                found[family] = self.rows(families[family], wanted)
                left -= len(found[family]) - quotas[family]
                quotas[family] = len(found[family])
                if len(found[family]) < wanted:
                    open_ones.remove(family)
        if left:
            raise DataError(f"BIG-bench holds {count - left} usable rows of these families, {count} wanted")
        return [row for rows in found.values() for row in rows]

    def rows(self, tasks: Sequence[str], count: int) -> list[dict[str, Any]]:
        """Up to `count` rows of tasks, from each in turn."""
        streams, made, seen = [self._rows(task) for task in tasks], [], set()
        while streams and len(made) < count:
            for stream in list(streams):
                row = next(stream, None)
                if row is None:
                    streams.remove(stream)
                elif row["prompt"] not in seen and len(made) < count:
                    seen.add(row["prompt"])
                    made.append(row)
        return made

    def _rows(self, task: str) -> Iterator[dict[str, Any]]:
        content, name = self._tasks[task], task.replace("/", "-")
        examples, prefix = content["examples"], (content.get("task_prefix") or "").strip()
        for index in np.random.default_rng([_SEED, *task.encode()]).permutation(len(examples)).tolist():
            question, (answer, choices) = examples[index].get("input"), _answer(examples[index])
            if not isinstance(question, str) or not question.strip() or not answer:
                continue
            prompt = f"{prefix} {question.strip()}".strip()
            if not self._fits(prompt, answer):
                continue
            row = {"id": f"{name}-{index}", "prompt": prompt, "completion": answer, "family": task.split("/")[0]}
            yield {**row, "choices": choices} if choices else row

    def _fits(self, prompt: str, answer: str) -> bool:
        if len(prompt) + len(answer) > 4 * MAX_TOKENS:
            return False
        return len(self._renderer([*_messages(prompt, answer)]).input_ids) <= MAX_TOKENS


def _answer(example: dict[str, Any]) -> tuple[str, list[str]]:
    """The target text (the best-scored choice, or the first accepted answer), and the choices, if there are any."""
    scores = example.get("target_scores")
    if scores:
        choices = [choice.strip() for choice in scores]
        usable = len(set(choices)) == len(choices) > 1 and all(choices)
        return str(max(scores, key=scores.__getitem__)).strip(), choices if usable else []
    target = example.get("target") or ""
    return str((target[0] if target else "") if isinstance(target, list) else target).strip(), []


def _copies(pool: list[dict[str, Any]], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Exact copies of 10 % of the rows and edited ones of other 10 %: other openings and ends, no final punctuation."""
    count = len(pool) // 10
    edits = (
        lambda text: f"Question: {text.rstrip(' .?!')}",
        lambda text: f"{text} Answer:",
        lambda text: f"Please answer. {text[:1].lower()}{text[1:]}",
    )
    for number, index in enumerate(rng.permutation(len(pool))[: 2 * count].tolist()):
        row = pool[index]
        kind = "exact" if number < count else "near"
        prompt = row["prompt"] if kind == "exact" else edits[number % len(edits)](row["prompt"])
        yield {**row, "id": f"{row['id']}-{kind}", "prompt": prompt, "duplicate_of": row["id"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="standard")
    arguments = parser.parse_args()
    print(json.dumps(build(arguments.folder, SIZES[arguments.size]), indent=2))


if __name__ == "__main__":
    main()
