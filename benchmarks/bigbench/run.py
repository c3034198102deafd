"""Run the whole benchmark, resumably, cheap things first.

    python benchmarks/bigbench/run.py [--size tiny|standard|large] [--folder F] [--only PART ...] [--estimate]

It builds pool and targets, collects gradients once, adds every target, and then runs the parts of `parts.yaml` one
after the other; the tables of each go to `results/<size>/`. Stopped at any moment, the same command goes on where it
stopped: what was trained and scored is known by what it was made of. A part that cannot be run is told, with the
reason, the others are run all the same, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from build import FAMILIES, IN_DOMAIN, SIZES, build

from gradpursuit.cli import main as gradpursuit
from gradpursuit.config import load_config
from gradpursuit.console import at_work
from gradpursuit.errors import GradPursuitError
from gradpursuit.files import read_json, sha256_of, write_json, write_text
from gradpursuit.pipeline import Run
from gradpursuit.quickstart.assets import cache_folder, smollm2
from gradpursuit.selection import STRATEGIES
from gradpursuit.targets import TargetFiles, add_target

HERE = Path(__file__).parent
Tree = dict[str, Any]


@dataclass
class Bench:
    """One run of the benchmark: where it lies, how large it is, and what went wrong so far."""

    folder: Path
    size: str
    plan: Tree
    device: str
    place: str = "run"
    problems: list[str] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        """The run folder, which all parts share but those that change the warm-up."""
        return self.folder / self.place

    @property
    def config(self) -> Path:
        """Its configuration."""
        return self.folder / f"{self.place}.yaml"

    @property
    def results(self) -> Path:
        """Where the tables go: those of a real size are kept beside this file."""
        return self.folder / "results" if self.size == "tiny" else HERE / "results" / self.size

    def names(self, value: Any) -> Any:
        """The targets that TARGETS, SOME and DEVELOPMENT stand for."""
        shape = SIZES[self.size]
        known = {
            "TARGETS": FAMILIES["targets"][: shape.targets],
            "SOME": FAMILIES["targets"][: min(3, shape.targets)],
            "DEVELOPMENT": FAMILIES["development"][: shape.development],
        }
        return known.get(value, value) if isinstance(value, str) else value

    def fail(self, problem: str) -> None:
        """Tell what could not be done and go on."""
        self.problems.append(problem)
        print(f"error: {problem}", file=sys.stderr, flush=True)


def load_plan(size: str) -> Tree:
    """`parts.yaml`, with the smaller settings of the tiny size."""
    plan: Tree = yaml.safe_load((HERE / "parts.yaml").read_text("utf-8"))
    smaller = plan.pop("tiny")
    return merged(plan, smaller) if size == "tiny" else plan


def merged(left: Mapping[str, Any], right: Mapping[str, Any]) -> Tree:
    """Nested settings, those on the right first."""
    both = dict(left)
    for key, value in right.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = merged(both[key], value) if nested else value
    return both


def prepare(bench: Bench) -> None:
    """Build the files if they are not what was built before, and write the configuration of the run."""
    record = bench.folder / "input" / "built.json"
    known = read_json(record) if record.is_file() else {}
    files = known.get("sha256", {})
    paths = {name: bench.folder / "input" / f"{name}.jsonl" for name in files}
    if not files or any(not p.is_file() or sha256_of(p) != files[name] for name, p in paths.items()):
        known = build(bench.folder / "input", SIZES[bench.size])
    write_json(bench.results / "built.json", known)
    strategies = bench.plan["run"]["selection"]["strategies"]
    if unknown := [name for name in strategies if name not in STRATEGIES]:
        known_names = ", ".join(STRATEGIES)
        bench.fail(f"no strategy is called {', '.join(unknown)}: its cells are left out (known: {known_names})")
    write_config(bench)


def write_config(bench: Bench) -> None:
    """The configuration of the run folder, with the strategies that there are."""
    inputs = bench.folder / "input"
    files = {"pool": "pool", "target": f"{IN_DOMAIN}.target", "heldout": f"{IN_DOMAIN}.heldout"}
    strategies = bench.plan["run"]["selection"]["strategies"]
    tree = {
        "run_dir": str(bench.run_dir),
        "model": {"path": str(smollm2(cache_folder())), "device": bench.device},
        "data": {split: str(inputs / f"{name}.jsonl") for split, name in files.items()},
        "selection": {"strategies": [name for name in strategies if name in STRATEGIES]},
    }
    write_text(bench.config, yaml.safe_dump(merged(bench.plan["run"], tree), sort_keys=False))


def collected(bench: Bench, overrides: list[str]) -> bool:
    """Warm-up, gradients of the pool, and of every target: what is there with these settings is kept."""
    if any(gradpursuit([verb, str(bench.config), *overrides]) for verb in ("warmup", "collect")):
        return False
    settings = [f"{flag[2:]}={value}" for flag, value in zip(overrides[::2], overrides[1::2], strict=True)]
    run = Run(load_config(bench.config, settings))
    try:
        with at_work(run):
            for name in [*bench.names("TARGETS"), *bench.names("DEVELOPMENT")]:
                paths = [str(bench.folder / "input" / f"{name}.{kind}.jsonl") for kind in ("target", "heldout")]
                add_target(run, name, TargetFiles(paths[:1], paths[1:]), replace=True)
    except GradPursuitError as error:
        bench.fail(str(error))
        return False
    return True


def run_part(bench: Bench, name: str, settings: Tree) -> None:
    """One comparison; its tables are kept under `name`."""
    if "warmup" in settings:  # another trajectory: in a folder of its own
        bench = replace(bench, place=f"run-{name}", plan=merged(bench.plan, {"run": {"warmup": settings["warmup"]}}))
        write_config(bench)
    evaluation = {key: bench.names(value) for key, value in settings.get("evaluation", {}).items()}
    asked = evaluation.get("strategies", [])
    evaluation["strategies"] = [strategy for strategy in asked if strategy in STRATEGIES]
    if missing := [strategy for strategy in asked if strategy not in STRATEGIES]:
        bench.fail(f"part {name}: without {', '.join(missing)}, which no strategy here is called")
    if evaluation.get("accuracy"):
        targets = evaluation["targets"]
        evaluation["targets"] = [target for target in targets if _has_choices(bench, target)]
        if left := [target for target in targets if target not in evaluation["targets"]]:
            bench.fail(f"part {name}: without {', '.join(left)}, whose rows have no choices")
    overrides = flags({**settings, "evaluation": evaluation})
    start = time.monotonic()
    if not collected(bench, overrides) or gradpursuit(["run", str(bench.config), *overrides]):
        bench.fail(f"part {name} ended with an error (above)")
        return
    keep(bench, name, overrides, time.monotonic() - start)


def _has_choices(bench: Bench, target: str) -> bool:
    lines = (bench.folder / "input" / f"{target}.heldout.jsonl").read_text("utf-8").splitlines()
    return all("choices" in json.loads(line) for line in lines)


def flags(settings: Tree) -> list[str]:
    """Settings as flags of the command line."""
    found = []
    for section, values in settings.items():
        for key, value in values.items():
            found += [f"--{section}.{key}", json.dumps(value)]
    return found


def keep(bench: Bench, name: str, overrides: list[str], seconds: float) -> None:
    """Copy the tables of the comparison that was just run, with machine and versions."""
    source = bench.run_dir / "evaluation"
    kept = {"table.csv": "cells.csv", "differences.csv": "differences.csv", "table.md": "md", "gain.png": "png"}
    for file, ending in kept.items():
        if (source / file).is_file():
            shutil.copyfile(source / file, _place(bench, f"{name}.{ending}"))
    record = {"settings": overrides, "seconds": round(seconds, 1), **provenance(bench)}
    write_json(_place(bench, f"{name}.json"), record)


def _place(bench: Bench, name: str) -> Path:
    bench.results.mkdir(parents=True, exist_ok=True)
    return bench.results / name


def provenance(bench: Bench) -> Tree:
    """Machine and versions."""
    import torch

    manifest = read_json(bench.run_dir / "manifest.json")
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in cpus if line.startswith("model name")]
    return {
        "gradpursuit": manifest["gradpursuit"],
        "packages": manifest["packages"],
        "machine": {
            **manifest["machine"],
            "model": names[0] if names else platform.machine(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "stage_seconds": {stage: entry.get("seconds") for stage, entry in manifest["stages"].items()},
    }


def estimate(bench: Bench) -> None:
    """Hours of every part, from the steps and rows that results of this run folder were measured with."""
    lines = (bench.run_dir / "evaluation" / "results.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line)["result"] for line in lines]
    trained = [r for r in found if r["train_seconds"] > 1 and r["steps"]]
    per_step = sum(r["train_seconds"] for r in trained) / sum(r["steps"] for r in trained)
    per_row = sum(r["score_seconds"] for r in found) / sum(len(r["losses"]) for r in found)
    full, total = load_plan("standard"), 0.0
    shape, common = SIZES["standard"], full["run"]["evaluation"]
    rows = round(shape.pool * 1.2)
    manifest = read_json(bench.run_dir / "manifest.json")["stages"]
    features = read_json(bench.run_dir / "manifest.json")["stages"]["data"]["detail"]["rows"]
    ratio = rows / features["pool"] * full["run"]["warmup"]["checkpoints"] / bench.plan["run"]["warmup"]["checkpoints"]
    collect = manifest["gradients"]["seconds"] * ratio
    print(f"{per_step:.2f} s a step, {per_row:.3f} s a held-out row; gradients {collect / 3600:.2f} h")
    total += collect + 3 * full["run"]["warmup"]["fraction"] * rows / 8 * per_step
    ablations = {f"ablation-{name}": merged(full["ablation"], s) for name, s in full["ablations"].items()}
    parts = full["parts"] | ablations
    for name, settings in parts.items():
        steps, scored = _work({**common, **settings["evaluation"]}, rows)
        seconds = steps * per_step + scored * shape.heldout * per_row
        total += seconds
        print(f"{name:24s} {steps:6.0f} steps, {scored:5.0f} scores, {seconds / 3600:5.2f} h")
    print(f"{'all':24s} {total / 3600:.2f} h")


TARGET_FREE = ("random", "el2n", "grand", "learning-percentage", "kmeans-quality")  # the same subset for every target


def _work(evaluation: Tree, rows: int) -> tuple[float, float]:
    """Optimizer steps and scored targets of one part, if nothing of it was there yet."""
    counts = {"TARGETS": 6, "SOME": 3, "DEVELOPMENT": 4}
    targets = counts[evaluation["targets"]] if isinstance(evaluation["targets"], str) else len(evaluation["targets"])
    steps = scored = 0.0
    for strategy in [*evaluation["strategies"], *(["full"] if "full" in evaluation["endpoints"] else [])]:
        for share in [1.0] if strategy == "full" else evaluation["budgets"]:
            epochs = evaluation["epochs"] * share * rows / evaluation["batch_size"]
            each = epochs if evaluation.get("protocols") == ["equal-epochs"] else evaluation["steps"]
            models = evaluation["seeds"] * (1 if strategy in (*TARGET_FREE, "full") else targets)
            steps += models * each
            scored += evaluation["seeds"] * targets * (targets if evaluation.get("crossed") else 1)
    return steps, scored + targets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="standard")
    parser.add_argument("--folder", type=Path, help="default: runs/bigbench-<size>")
    parser.add_argument("--only", nargs="+", help="parts, ablations and `paper`; default: all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--estimate", action="store_true", help="hours that the standard size takes, from what was run")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path("runs") / f"bigbench-{arguments.size}").resolve()
    bench = Bench(folder, arguments.size, load_plan(arguments.size), arguments.device)
    if arguments.estimate:
        estimate(bench)
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    prepare(bench)
    jobs = everything(bench)
    if unknown := set(arguments.only or ()) - set(jobs):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; parts: {', '.join(jobs)}")
    for name, job in jobs.items():
        if not arguments.only or name in arguments.only:
            print(f"== {name}", file=sys.stderr, flush=True)
            job()
    for problem in bench.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if bench.problems else 0


def everything(bench: Bench) -> dict[str, Callable[[], None]]:
    """All parts by name, in order."""
    from paper import paper

    def part(name: str, settings: Tree) -> Callable[[], None]:
        return lambda: run_part(bench, name, settings)

    cheap = ("control", "in-domain")
    parts = {name: part(name, settings) for name, settings in bench.plan["parts"].items()}
    ablations = {
        f"ablation-{name}": part(f"ablation-{name}", merged(bench.plan["ablation"], settings))
        for name, settings in bench.plan["ablations"].items()
    }
    first = {name: parts.pop(name) for name in cheap}
    last = {"full": parts.pop("full")}
    return {**first, "paper": lambda: paper(bench), **parts, **last, **ablations}


if __name__ == "__main__":
    logging.captureWarnings(True)
    sys.exit(main())
