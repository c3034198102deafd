"""What the peers' scripts share. Imported in the peers' own environments, which do not have gradpursuit."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

RANK = 8


def arguments(peer: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=f"Time the gradients of {peer}.")
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("rows", type=Path, help="JSON Lines with input_ids and labels")
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="passes over the rows; the median is reported")
    parser.add_argument("--limit", type=int, help="only so many rows")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with the number of threads set; call it before torch is imported."""
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    return args


def read_rows(path: Path, limit: int | None) -> list[dict[str, Any]]:
    with path.open() as file:
        return [json.loads(line) for line in file][:limit]


def adapted(model: Path) -> Any:
    """The model with a LoRA adapter of rank 8 on all its linear layers; B is random, as it is after a warm-up."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(
        r=RANK, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(base.eval(), config)


def write_result(args: argparse.Namespace, peer: str, rows: int, seconds: list[float], **more: Any) -> None:
    import torch

    median = statistics.median(seconds)
    result = {
        "peer": peer,
        "version": version(peer),
        "rows": rows,
        "seconds": median,
        "rows_per_second": rows / median,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **more,
        "every_seconds": seconds,
        "machine": {"processor": _processor(), "threads": args.threads, "python": platform.python_version()},
        "torch": torch.__version__,
    }
    text = json.dumps(result, indent=2) + "\n"
    args.output.write_text(text)
    print(text, end="")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
