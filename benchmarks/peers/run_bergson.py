"""Time `bergson build`: a gradient index of the rows, projected to 16 × 16 per module, without an optimizer's state.

Runs the command itself (its `main`), in this process; the seconds are those of its gradient collection, which
excludes imports, loading the model and reading the rows. `command_seconds` is all of the command but starting Python
and torch.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common


def main() -> None:
    parser = common.arguments("bergson")
    parser.add_argument("--tokens", type=int, default=2048, help="token_batch_size; 2,048 is bergson's default")
    parser.add_argument("--precision", default="fp32", help="of the model's parameters; fp32 is bergson's default")
    args = common.parse(parser)
    rows = common.read_rows(args.rows, args.limit)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        adapter, data = work / "adapter", work / "rows.jsonl"
        common.adapted(args.model).save_pretrained(adapter)
        columns = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
        data.write_text("".join(json.dumps(row) + "\n" for row in columns))
        seconds: list[float] = []
        command = 0.0
        for repeat in range(args.repeats):
            options = {
                "model": adapter,
                "tokenizer": args.model,
                "dataset": data,
                "projection_dim": 16,
                "loss_reduction": "mean",
                "token_batch_size": args.tokens,
                "precision": args.precision,
            }
            begin = time.perf_counter()
            seconds.append(build(work / f"index-{repeat}", options))
            command = command or time.perf_counter() - begin
        sizes = json.loads((work / "index-0" / "info.json").read_text())["grad_sizes"]
    common.write_result(
        args,
        "bergson",
        len(rows),
        seconds,
        what=f"bergson build: LoRA r=8 on all linear layers, {args.precision}, gradient of the mean loss, no Adam, "
        f"projected to 16 x 16 per adapter matrix, batches of {args.tokens} tokens, written to disk",
        command_seconds=command,
        features_per_row=sum(sizes.values()),
    )


def build(run: Path, options: dict[str, Any]) -> float:
    """Run `bergson build RUN --option value …`; the seconds that its gradient collection took."""
    import bergson.build
    from bergson.__main__ import main as bergson_main

    seconds = []
    collect = bergson.build.collect_gradients

    def timed(*args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        collect(*args, **kwargs)
        seconds.append(time.perf_counter() - begin)

    bergson.build.collect_gradients = timed
    sys.argv = ["bergson", "build", str(run), *(f"--{name}={value}" for name, value in options.items())]
    try:
        bergson_main()
    finally:
        bergson.build.collect_gradients = collect
    return seconds[0]


if __name__ == "__main__":
    main()
