"""How fast a pool is read, rendered, and cleaned, and in how much memory.

    python benchmarks/data.py --rows 100000 1000000 --json data.json

For every size a JSONL file of questions and answers of BIG-bench is written, made distinct by a number, but for every
tenth, which is a copy of an earlier row; then the data stage of a run reads it, in a process of its own: it recognises
the schema, renders and tokenizes every row as SmolLM2 sees it, drops copies (`data.deduplicate: exact`) and what leaks
the 48 target rows, and writes the tables. Printed are rows a second and the most memory that the process held; the
same of the smallest size says what comes with the program.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import TASKS, answer_of

from gradpursuit.config import DataSection, ModelSection, SourceSection
from gradpursuit.data import Renderer
from gradpursuit.data.prepare import prepare
from gradpursuit.quickstart.assets import bigbench_tasks, cache_folder, smollm2
from gradpursuit.trajectory.model import load_tokenizer
from store import machine

TARGETS, COPIES = 48, 10  # rows of the target; every so many rows of the pool is a copy


def questions(rows: int) -> Iterator[dict[str, str]]:
    """So many rows, the same every time."""
    tasks = bigbench_tasks(cache_folder(), list(TASKS)).values()
    known = [(example["input"].strip(), answer_of(example)) for task in tasks for example in task["examples"]]
    for number in range(rows):
        index = number - 1 if number % COPIES == COPIES - 1 else number
        prompt, answer = known[index % len(known)]
        yield {"prompt": f"Question {index}. {prompt}", "completion": answer}


def write(path: Path, rows: Iterator[dict[str, str]]) -> None:
    """As JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def clean(folder: Path) -> dict[str, Any]:
    """Run the data stage over what lies in `folder`; seconds, rows, and bytes."""
    renderer = Renderer(load_tokenizer(ModelSection(path=str(smollm2(cache_folder())))))
    pool, target = ([SourceSection(path=str(folder / f"{name}.jsonl"))] for name in ("pool", "target"))
    config = DataSection(pool=pool, target=target, deduplicate="exact", max_tokens=512)
    before, began = peak(), time.perf_counter()
    found = prepare(config, renderer, folder / "data", holdout=0.25, seed=0)
    return {
        "seconds": time.perf_counter() - began,
        "rows_kept": found["rows"]["pool"],
        "dropped": found["dropped"],
        "input_bytes": (folder / "pool.jsonl").stat().st_size,
        "peak_bytes_before": before,
        "peak_bytes": peak(),
    }


def peak() -> int:
    """The most memory that this process held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the temporary files go; default: the system's")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--clean", type=Path, help=argparse.SUPPRESS)  # what a process of its own is started with
    options = parser.parse_args()
    if options.clean:
        print(json.dumps(clean(options.clean)))
        return
    figures = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write(Path(folder) / "pool.jsonl", questions(rows))
            write(Path(folder) / "target.jsonl", questions(TARGETS))
            command = [sys.executable, __file__, "--clean", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        one = {"rows": rows, **json.loads(done.stdout.splitlines()[-1])}
        figures.append(one)
        print(
            f"{rows:,} rows ({one['input_bytes'] / 1e6:,.0f} MB): {one['seconds']:,.0f} s, "
            f"{rows / one['seconds']:,.0f} rows/s, {one['rows_kept']:,} kept, most memory "
            f"{one['peak_bytes'] / 1e9:.2f} GB, {one['peak_bytes_before'] / 1e9:.2f} GB of it before",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(1), "sizes": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
