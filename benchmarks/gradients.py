"""Gradients: what a row of features costs, beside the forward and backward pass it rides on and other ways to it.

    python benchmarks/gradients.py --out gradients.json
    python benchmarks/gradients.py --peer bergson=VENV/bin/python --peer dattri_llm=VENV/bin/python
    python benchmarks/gradients.py --random-1b --device cuda       # a Llama of 1 B parameters, random weights

SmolLM2-135M-Instruct with LoRA (r = 8) on all linear layers and random adapter weights; 128 BIG-bench rows. All
variants take turns, `--rounds` times, in one process; the medians are reported. Peers run alone, each in an
environment of its own (peers/README.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from gradpursuit.config import LoraSection, ModelSection
from gradpursuit.data import IGNORE, Row, Table
from gradpursuit.gradients.collector import Collector
from gradpursuit.gradients.engine import FeatureEngine
from gradpursuit.gradients.filling import CollectSpec
from gradpursuit.gradients.linear import FollowedLinear
from gradpursuit.gradients.per_example import PerExampleGradients
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.gradients.sketch import SparseSketch
from gradpursuit.trajectory.checkpoint import AdamState
from gradpursuit.trajectory.loss import SupervisedLoss, collate, token_batches
from gradpursuit.trajectory.model import Compute, attach_lora, load_model, trainable

DIM, BATCH = 8192, 16
PLAIN, RIDE, BARE, WHOLE = (
    "plain training step: batch 16, every logit, float32",
    "forward + backward with the adapter: labels only, by length, autocast",
    "forward + backward, adapter folded in",
    "the whole row: gradient, Adam, sketch, write",
)
LABELS = "forward + backward with the adapter: labels only, batch 16, float32"


@dataclass(frozen=True)
class FixedCheckpoint:
    """Random adapter weights and Adam moments that stand for one checkpoint of a trajectory."""

    state: AdamState

    def load_adapter(self, model: nn.Module) -> None:
        """The weights are the model's already."""

    def adam(self, model: nn.Module) -> AdamState:
        """The moments."""
        return self.state


@dataclass
class World:
    """Model, rows and settings of one benchmark run."""

    model: Any
    compute: Compute
    rows: list[Row]
    state: AdamState
    budget: int

    @property
    def exact(self) -> Compute:
        """The same device in plain float32."""
        return Compute(self.compute.device, None)

    def batches(self, by_length: bool) -> list[list[Row]]:
        """The rows in batches of 16 in their order, or of similar length under the token budget."""
        if not by_length:
            return [self.rows[i : i + BATCH] for i in range(0, len(self.rows), BATCH)]
        plan = token_batches([len(row.input_ids) for row in self.rows], self.budget)
        return [[self.rows[i] for i in batch] for batch in plan]

    def collect(self, rows: Sequence[Row], folder: Path) -> Any:
        """Adam features of `rows`, written to a store, as a run does it."""
        spec = CollectSpec(DIM, 2, 0, self.budget, "float32", 512, 0.0, {})
        collector = Collector(self.model, self.compute, [FixedCheckpoint(self.state)], spec)  # type: ignore[list-item]
        return collector.collect("pool", Table(list(rows)), [Preconditioner("adam")], folder)["adam"]


def build(arguments: argparse.Namespace) -> World:
    """Model, adapter, moments and rows."""
    from gradpursuit.quickstart.assets import cache_folder, smollm2

    path = "random" if arguments.random_1b else str(smollm2(cache_folder()))
    section = ModelSection(path=path, device=arguments.device, precision=arguments.precision)
    compute = Compute.of(section)
    base = random_llama() if arguments.random_1b else load_model(section)
    model = attach_lora(base, LoraSection(), seed=0).to(compute.device)
    generator = torch.Generator().manual_seed(0)

    def random(scale: float, positive: bool = False) -> dict[str, Tensor]:
        draw = torch.rand if positive else torch.randn
        return {n: scale * draw(p.shape, generator=generator).to(p.device) for n, p in trainable(model).items()}

    with torch.no_grad():
        for name, value in random(0.01).items():
            trainable(model)[name].add_(value)
    state = AdamState(random(1e-3), random(1e-6, positive=True), 10, 0.9, 0.999, 1e-8)
    rows = random_rows(1024) if arguments.random_1b else bigbench_rows()
    return World(model, compute, rows, state, arguments.tokens_per_batch)


def bigbench_rows() -> list[Row]:
    """The 128 rows."""
    from rows import build_rows

    return build_rows()


def random_llama() -> Any:
    """A Llama of about 1 B parameters (the shape of Llama 3.2 1B) with random weights, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(shape).requires_grad_(False).eval()


def random_rows(count: int) -> list[Row]:
    """Random tokens, 20 to 128 a row, of which the last eighth is supervised."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(count):
        length = int(torch.randint(20, 129, (), generator=generator))
        ids = torch.randint(3, 32_000, (length,), generator=generator).tolist()
        head = length - length // 8
        rows.append(Row(f"row-{number}", str(number), "random", number, "{}", ids, [IGNORE] * head + ids[head:]))
    return rows


def plain_steps(world: World) -> None:
    """Training steps as a plain script makes them: batches in order, every logit, float32, AdamW."""
    optimizer = torch.optim.AdamW(trainable(world.model).values(), lr=0.0)
    for rows in world.batches(by_length=False):
        longest = max(len(row.input_ids) for row in rows)
        batch = {name: value[:, :longest].to(world.compute.device) for name, value in collate(rows, 0).items()}
        world.model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def with_adapter(world: World, compute: Compute, by_length: bool) -> None:
    """Forward and backward pass of a training step, with logits for labels only."""
    loss = SupervisedLoss(world.model, compute)
    for rows in world.batches(by_length):
        loss(collate(rows, 0))[0].sum().backward()
        world.model.zero_grad(set_to_none=True)


def folded_in(world: World, gradients: PerExampleGradients) -> None:
    """Forward and backward pass with the adapter folded into the weights, and nothing made of it."""
    loss = SupervisedLoss(world.model, world.compute)
    with mock.patch.object(FollowedLinear, "gradients", return_value=[]):
        for rows in world.batches(by_length=True):
            with gradients.capture(lambda *_: None):
                loss(collate(rows, 0))[0].sum().backward()


def whole_rows(world: World) -> None:
    """Everything, from rows to a store on disk."""
    with tempfile.TemporaryDirectory() as folder:
        world.collect(world.rows, Path(folder))


def measure(world: World, rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round; they take turns, after one round that is not counted."""
    gradients = PerExampleGradients(world.model, world.compute.autocast)
    variants: dict[str, Callable[[], None]] = {
        PLAIN: lambda: plain_steps(world),
        LABELS: lambda: with_adapter(world, world.exact, by_length=False),
        RIDE: lambda: with_adapter(world, world.compute, by_length=True),
        BARE: lambda: folded_in(world, gradients),
        WHOLE: lambda: whole_rows(world),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    world.model.eval()
    for number in range(rounds + 1):
        for name, variant in variants.items():
            with attention(world, "sdpa" if name == PLAIN else None):
                seconds[name].append(clock(world, variant))
        print(f"round {number}: " + ", ".join(f"{values[-1]:.1f} s" for values in seconds.values()), flush=True)
    return {name: values[1:] for name, values in seconds.items()}


@contextmanager
def attention(world: World, implementation: str | None) -> Iterator[None]:
    """The plain step computes attention as transformers does by itself."""
    usual = world.model.config._attn_implementation
    if implementation:
        world.model.get_base_model().set_attn_implementation(implementation)
    try:
        yield
    finally:
        world.model.get_base_model().set_attn_implementation(usual)


def clock(world: World, work: Callable[[], None]) -> float:
    """Seconds that `work` takes."""
    cuda = world.compute.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def precision_effect(world: World) -> dict[str, float]:
    """1 - cos between features in the lower precision and in float32, per row."""
    sizes = {name: parameter.numel() for name, parameter in trainable(world.model).items()}
    sketch = SparseSketch(sizes, DIM, 2, 0, world.compute.device)
    found = []
    for compute in (world.exact, world.compute):
        engine = FeatureEngine(world.model, compute, sketch, world.budget)
        engine.prepare([Preconditioner("adam")], world.state)
        found.append(engine.compute(world.rows, lambda _: None).kinds[0].features.double())
    lost = 1 - torch.nn.functional.cosine_similarity(*found)
    return {"median": float(lost.median()), "max": float(lost.max())}


def peak_memory(arguments: argparse.Namespace) -> dict[str, int]:
    """Peak resident bytes of collections beyond those of the model and one batch, each in a process of its own."""
    peaks = []
    for copies in (0, 1, 4, 8):
        command = [sys.executable, __file__, "--memory", str(copies)]
        command += ["--tokens-per-batch", str(arguments.tokens_per_batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.strip().splitlines()[-1]))
    batch, *collections = peaks
    return {f"{128 * copies} rows": peak - batch for copies, peak in zip((1, 4, 8), collections, strict=True)}


def memory_of_one(arguments: argparse.Namespace) -> int:
    """Peak resident bytes of a process that collects from so many copies of the rows; 0: that passes forward and
    backward through one batch after the other, with the adapter and no gradient of an example."""
    world = build(arguments)
    _peak()  # what loading the model took does not count
    if arguments.memory == 0:
        with_adapter(world, world.compute, by_length=True)
        return _peak()
    rows = [Row(f"{row.id}-{copy}", *_rest(row)) for copy in range(arguments.memory) for row in world.rows]
    with tempfile.TemporaryDirectory() as folder:
        world.collect(rows, Path(folder))
    return _peak()


def _rest(row: Row) -> tuple[Any, ...]:
    return row.hash, row.source, row.line, row.original, row.input_ids, row.labels


def _peak() -> int:
    """Peak resident bytes since the last call."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            peak = int(line.split()[1]) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def run_peer(peer: str, rows: list[Row]) -> tuple[str, dict[str, Any]]:
    """Rows a second of another program, in its own environment; `peer` is NAME=PYTHON or NAME=PYTHON:ROWS."""
    from rows import write_jsonl

    from gradpursuit.quickstart.assets import cache_folder, smollm2

    name, _, where = peer.partition("=")
    interpreter, _, limit = where.partition(":")
    script = Path(__file__).parent / "peers" / f"run_{name}.py"
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "rows.jsonl", Path(folder) / "out.json"
        write_jsonl(rows, path)
        model = str(smollm2(cache_folder()))
        command = [interpreter, script, model, path, out, "--threads", str(torch.get_num_threads())]
        if limit:
            command += ["--limit", limit]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(out.read_text())
    return name, found


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that was asked for; peers first, while this process holds no model beside them."""
    peers = dict(run_peer(peer, bigbench_rows()) for peer in arguments.peer)
    world = build(arguments)
    seconds = measure(world, arguments.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: len(world.rows) / value for name, value in medians.items()}
    ratios = {
        "whole row / forward + backward with the adapter": medians[WHOLE] / medians[RIDE],
        "whole row / forward + backward, adapter folded in": medians[WHOLE] / medians[BARE],
        "plain training step / whole row": medians[PLAIN] / medians[WHOLE],
    }
    found: dict[str, Any] = {
        "machine": machine(world), "rows": len(world.rows), "seconds": seconds, "rows/s": rates, **peers
    }  # fmt: skip
    if world.compute.autocast:
        found["1 - cos to float32"] = precision_effect(world)
    if world.compute.device.type == "cpu":
        found["peak bytes beyond model and batch"] = peak_memory(arguments)
    if arguments.reference:
        from peers.reference import reference_rows_per_second

        reference = reference_rows_per_second(world.model, world.rows, world.state, limit=arguments.reference)
        rates["reference: one by one, dense projection"] = reference.rows_per_second
        ratios["whole row / reference, rows a second"] = rates[WHOLE] * reference.seconds_per_row
    for name, peer in peers.items():
        rates[name] = peer["rows_per_second"]
        ratios[f"whole row / {name}, rows a second"] = rates[WHOLE] / rates[name]
    return {**found, "ratios": ratios}


def machine(world: World) -> dict[str, Any]:
    """What the figures were taken on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "compute": str(world.compute),
        "processor": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens_per_batch": world.budget,
    }


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--tokens-per-batch", type=int, default=1024)
    parser.add_argument("--random-1b", action="store_true", help="a Llama of 1 B parameters with random weights")
    parser.add_argument("--reference", type=int, default=4, metavar="ROWS", help="rows for the reference way; 0: none")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON[:ROWS]", help="bergson or dattri_llm"
    )
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory is not None:
        print(memory_of_one(arguments))
        return
    found = report(arguments)
    print(json.dumps(found["machine"]))
    for name, rate in found["rows/s"].items():
        print(f"{rate:9.2f} rows/s  {name}")
    for name, ratio in found["ratios"].items():
        print(f"{ratio:9.2f} x       {name}")
    for name in ("1 - cos to float32", "peak bytes beyond model and batch"):
        if name in found:
            print(f"{name}: {found[name]}")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
