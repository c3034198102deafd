"""Run the whole benchmark, resumably, cheap things first.

    python benchmarks/bigbench/run.py [--size tiny|standard|large] [--folder F] [--only PART ...] [--estimate]

It builds pool and targets, collects gradients once, adds every target, and then runs the parts of `parts.yaml` one
after the other; the tables of each go to `results/<size>/`. Stopped at any moment, the same command goes on where it
stopped: what was trained and scored is known by what it was made of. A part that ends with an error is told, the others
are run all the same, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from build import IN_DOMAIN, SIZES, build
from costs import estimate, merged, parts_of, target_names
from defaults import write_defaults
from summary import write_summary

from gradpursuit.cli import main as gradpursuit
from gradpursuit.config import load_config
from gradpursuit.console import at_work
from gradpursuit.errors import DataError, GradPursuitError
from gradpursuit.files import read_json, sha256_of, write_json, write_text
from gradpursuit.pipeline import Run
from gradpursuit.quickstart.assets import cache_folder, smollm2
from gradpursuit.targets import TargetFiles, add_target

HERE = Path(__file__).parent
INTERRUPTED = 130  # exit code of a verb
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

    def names(self, value: str | list[str]) -> list[str]:
        """The targets that TARGETS, EVERY, SOME and DEVELOPMENT stand for."""
        return target_names(SIZES[self.size], value)

    def fail(self, problem: str) -> None:
        """Tell what could not be done and go on."""
        self.problems.append(problem)
        print(f"error: {problem}", file=sys.stderr, flush=True)


def load_plan(size: str) -> Tree:
    """`parts.yaml`, with the settings that the size has of its own."""
    plan: Tree = yaml.safe_load((HERE / "parts.yaml").read_text("utf-8"))
    own = {name: plan.pop(name, {}) for name in SIZES}
    return merged(plan, own[size])


def prepare(bench: Bench) -> None:
    """Build the files if they are not what was built before, and write the configuration of the run.

    Raises:
        DataError: they are not those that the results which are kept were measured with.
    """
    record, kept = bench.folder / "input" / "built.json", bench.results / "built.json"
    known = read_json(record) if record.is_file() else {}
    files = known.get("sha256", {})
    paths = {name: bench.folder / "input" / f"{name}.jsonl" for name in files}
    if not files or any(not p.is_file() or sha256_of(p) != files[name] for name, p in paths.items()):
        known = build(bench.folder / "input", SIZES[bench.size])
    if kept.is_file() and (before := read_json(kept)["sha256"]) != known["sha256"]:
        other = sorted(n for n in before.keys() | known["sha256"].keys() if before.get(n) != known["sha256"].get(n))
        raise DataError(
            f"{bench.folder / 'input'}: {', '.join(other)} is not what {kept} was measured with: another builder, "
            "tokenizer or BIG-bench; go back to those, or delete the results and the run folder to begin anew"
        )
    write_json(kept, known)
    write_config(bench, bench.names("TARGETS")[0])


def write_config(bench: Bench, target: str) -> None:
    """The configuration of the run folder: its pool is its own target; what is exported is chosen for `target`."""
    inputs = bench.folder / "input"
    tree = {
        "run_dir": str(bench.run_dir),
        "model": {"path": str(smollm2(cache_folder())), "device": bench.device},
        "data": {
            "pool": str(inputs / "pool.jsonl"),
            "target": None,
            "heldout": str(inputs / f"{IN_DOMAIN}.heldout.jsonl"),
        },
        "selection": {"target": target},
    }
    write_text(bench.config, yaml.safe_dump(merged(bench.plan["run"], tree), sort_keys=False))


def done(verb: str, bench: Bench, overrides: list[str]) -> bool:
    """Whether a verb of the command line ended well; an interrupt is one of the whole benchmark."""
    code = gradpursuit([verb, str(bench.config), *overrides])
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code == 0


def collected(bench: Bench, targets: list[str], overrides: list[str]) -> bool:
    """Warm-up, gradients of the pool, and of the targets: what is there with these settings is kept."""
    if not all(done(verb, bench, overrides) for verb in ("warmup", "collect")):
        return False

    def add(run: Run) -> None:
        for name in targets:
            paths = [str(bench.folder / "input" / f"{name}.{kind}.jsonl") for kind in ("target", "heldout")]
            add_target(run, name, TargetFiles(paths[:1], paths[1:]), replace=True)

    return worked(bench, overrides, add)


def worked(bench: Bench, overrides: list[str], work: Callable[[Run], None]) -> bool:
    """Do something with the run as it is configured; whether that ended well."""
    settings = [f"{flag[2:]}={value}" for flag, value in zip(overrides[::2], overrides[1::2], strict=True)]
    run = Run(load_config(bench.config, settings))
    try:
        with at_work(run):
            work(run)
    except GradPursuitError as error:
        bench.fail(str(error))
        return False
    return True


def run_part(bench: Bench, name: str, settings: Tree) -> None:
    """One comparison; its tables are kept under `name`."""
    evaluation = {**settings["evaluation"], "targets": bench.names(settings["evaluation"]["targets"])}
    strategies, targets = evaluation["strategies"], evaluation["targets"]
    if own := {section: settings[section] for section in ("warmup", "gradients") if section in settings}:
        # Other features: in a folder of its own, and only those that it needs.
        bench = replace(bench, place=f"run-{name}", plan=merged(bench.plan, {"run": own}))
        write_config(bench, targets[0])
    else:
        strategies = list(dict.fromkeys([*bench.plan["run"]["selection"]["strategies"], *strategies]))
        targets = [*bench.names("TARGETS"), *bench.names("DEVELOPMENT")]
    overrides = flags({**settings, "selection": {"strategies": strategies}, "evaluation": evaluation})
    start = time.monotonic()
    made = collected(bench, targets, overrides)
    if not made or not worked(bench, overrides, lambda run: run.execute("evaluation")):
        bench.fail(f"part {name} ended with an error (above)")
        return
    keep(bench, name, overrides, time.monotonic() - start)


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
    write_summary(bench.results, name)
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
        "commit": code_commit(),
        "packages": manifest["packages"],
        "machine": {
            **manifest["machine"],
            "model": names[0] if names else platform.machine(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "stage_seconds": {stage: entry.get("seconds") for stage, entry in manifest["stages"].items()},
    }


def code_commit() -> str | None:
    """The last commit that changed the package, with `+` if it was changed since; None outside a clone."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words, "--", "src"], cwd=HERE.parents[1], **told).stdout.strip()

    told: Tree = {"check": True, "capture_output": True, "text": True}
    try:
        return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="standard")
    parser.add_argument("--folder", type=Path, help="default: runs/bigbench-<size>")
    parser.add_argument("--only", nargs="+", help="parts, ablations and `paper`; default: those of `order`")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--estimate", action="store_true", help="hours that the standard size takes, from what was run")
    arguments = parser.parse_args()
    folder = (arguments.folder or Path("runs") / f"bigbench-{arguments.size}").resolve()
    bench = Bench(folder, arguments.size, load_plan(arguments.size), arguments.device)
    if arguments.estimate:
        try:
            print(estimate(bench.run_dir, bench.plan, load_plan("standard")))
        except GradPursuitError as error:
            parser.exit(2, f"error: {error}\n")
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    jobs = everything(bench)
    if unknown := set(arguments.only or ()) - set(jobs):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; parts: {', '.join(jobs)}")
    try:
        prepare(bench)
    except GradPursuitError as error:
        parser.exit(2, f"error: {error}\n")
    try:
        run_jobs(bench, jobs, arguments.only)
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, "interrupted; the same command goes on where it stopped\n")
    for problem in bench.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if bench.problems else 0


def run_jobs(bench: Bench, jobs: dict[str, Callable[[], None]], only: list[str] | None) -> None:
    """One part after the other, and the table of the ablations."""
    for name, job in jobs.items():
        if name in (only or bench.plan["order"]):
            print(f"== {name}", file=sys.stderr, flush=True)
            job()
            write_defaults(bench.results)


def everything(bench: Bench) -> dict[str, Callable[[], None]]:
    """All parts by name, in order."""
    from paper import paper

    settings = parts_of(bench.plan)
    jobs: dict[str, Callable[[], None]] = {name: partial(run_part, bench, name, own) for name, own in settings.items()}
    jobs["paper"] = lambda: paper(bench)
    return {name: jobs[name] for name in dict.fromkeys([*bench.plan["order"], *jobs])}


if __name__ == "__main__":
    logging.captureWarnings(True)
    sys.exit(main())
