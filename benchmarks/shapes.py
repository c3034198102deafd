"""Resident memory that products of new shapes leave behind: why batches have few widths.

`python benchmarks/shapes.py` multiplies matrices of 140 different numbers of rows by one matrix of SmolLM2-135M's
size, each in a process of its own, and prints what remains for each shape once nothing of it is in use.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROWS = range(420, 1400, 7)
PRODUCTS = ("linear", "matmul", "bmm")


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(product: str, dtype: torch.dtype) -> float:
    """Bytes left for each shape."""
    torch.set_num_threads(1)
    weight, small = torch.randn(1536, 576).to(dtype), torch.randn(1, 1400, 8).to(dtype)

    def multiply(rows: int) -> None:
        if product == "linear":
            F.linear(torch.randn(rows, 576).to(dtype), weight)
        elif product == "matmul":
            torch.randn(rows, 1536).to(dtype) @ weight
        else:
            torch.bmm(small[:, :rows].transpose(1, 2), torch.randn(1, rows, 576).to(dtype))

    multiply(max(ROWS) + 7)
    before = resident()
    for rows in ROWS:
        multiply(rows)
    return (resident() - before) / len(ROWS)


def main() -> None:
    """Print a line for every product and type."""
    if len(sys.argv) > 2:
        print(measure(sys.argv[1], getattr(torch, sys.argv[2])))
        return
    for product in PRODUCTS:
        for dtype in ("float32", "bfloat16"):
            command = [sys.executable, __file__, product, dtype]
            left = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(f"{product:8s} {dtype:9s} {left / 1e6:6.2f} MB a shape", flush=True)


if __name__ == "__main__":
    main()
