"""How much of what `dsir` draws is of the target's task, for each way to fit its bags of words.

    python benchmarks/dsir.py [--draws 3] [--markdown FILE]

The tasks are the quickstart's and the development targets of the BIG-bench benchmark, without the targets that
benchmark reports. Each task in turn is the target, with 8 to 64 rows; other rows of it are in the pool, beside as many
of every other task. As many rows as the task has in the pool are drawn, 50 at most. Nothing is trained; no model is
needed.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from rows import answer_of

from gradpursuit.files import write_text
from gradpursuit.quickstart.assets import bigbench_tasks, cache_folder
from gradpursuit.quickstart.build import POOL
from gradpursuit.selection import dsir

FAMILIES = json.loads((Path(__file__).parent / "bigbench" / "families.json").read_text("utf-8"))
TASKS = [*(task for task in POOL if task not in FAMILIES["targets"]), *FAMILIES["development"]]
POOL_ROWS, TARGET_ROWS, MOST = (24, 100, 600), (8, 16, 24, 32, 64), 50
WAYS: dict[str, dict[str, Any]] = {
    "+1": {"smoothing": 1},
    "+0.1": {"smoothing": 0.1},
    "+0.01": {"smoothing": 0.01},
    "paper": {"smoothing": "paper"},
    "prior 100": {"prior": 100},
    "prior 1000": {"prior": 1000},
    "prior 10000": {"prior": 10_000},
}
_SEED = 4


def texts(draw: int) -> dict[str, list[str]]:
    """Distinct texts of every task, in random order: enough for the largest pool and target."""
    rng = np.random.default_rng([_SEED, draw])
    found = {}
    for task, content in bigbench_tasks(cache_folder(), TASKS).items():
        rows = dict.fromkeys(f"{example['input']}\n{answer_of(example)}" for example in content["examples"])
        order = rng.permutation(len(rows))[: max(POOL_ROWS) + max(TARGET_ROWS)].tolist()
        kept = list(rows)
        found[task] = [kept[i] for i in order]
    return found


def shares(rows: dict[str, list[str]], per_task: int, target_rows: int, draw: int) -> dict[str, list[float]]:
    """For every way the share of the drawn rows that are of the target's task, one value for each target."""
    pools = {task: own[target_rows : target_rows + per_task] for task, own in rows.items()}
    of = [task for task, own in pools.items() for _ in own]
    pool = [text for own in pools.values() for text in own]
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for task, own in rows.items():
        k = min(MOST, len(pools[task]))
        for way, options in WAYS.items():
            weights = dsir.log_importance(pool, own[:target_rows], **options)
            noise = np.random.default_rng([_SEED, draw]).gumbel(size=len(pool))
            drawn = np.argsort(-(weights + noise), kind="stable")[:k]
            found[way].append(float(np.mean([of[i] == task for i in drawn])))
    return found


def table(draws: int) -> str:
    """Markdown: mean share over targets and draws, and the worst target's mean."""
    all_rows = [texts(draw) for draw in range(draws)]
    lines = [f"| pool rows per task | target rows | {' | '.join(WAYS)} |", "|---|---|" + "---|" * len(WAYS)]
    for per_task in POOL_ROWS:
        for target_rows in TARGET_ROWS:
            drawn = [shares(rows, per_task, target_rows, draw) for draw, rows in enumerate(all_rows)]
            values = [np.mean([one[way] for one in drawn], axis=0) for way in WAYS]
            cells = " | ".join(f"{value.mean():.2f} ({value.min():.2f})" for value in values)
            lines.append(f"| {per_task} | {target_rows} | {cells} |")
            print(lines[-1], flush=True)
    return "\n".join([*lines, ""])


def machine() -> str:
    """The processor's name, where the system tells it."""
    place = Path("/proc/cpuinfo")
    lines = place.read_text().splitlines() if place.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    arguments = parser.parse_args()
    start = time.monotonic()
    with patch.object(dsir, "tokens", cache(dsir.tokens)):  # every text is in many pools
        found = table(arguments.draws)
    print(f"{len(TASKS)} targets, {arguments.draws} draws, {time.monotonic() - start:.0f} s on {machine()}")
    if arguments.markdown:
        write_text(arguments.markdown, found)


if __name__ == "__main__":
    main()
