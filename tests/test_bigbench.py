"""The BIG-bench benchmark: what it is built of, what it counts and tells, and that its parts run."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradpursuit.config import build_config
from gradpursuit.errors import DataError
from gradpursuit.files import sha256_of
from gradpursuit.selection import STRATEGIES, check_strategies
from jobs import Job

FOLDER = Path(__file__).parent.parent / "benchmarks" / "bigbench"
# What BIG-bench Hard (arXiv 2210.09261) took of BIG-bench.
HARD = {
    "boolean_expressions", "causal_judgment", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies_syllogisms_negation", "geometric_shapes", "hyperbaton", "logical_deduction",
    "movie_recommendation", "multistep_arithmetic", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects", "web_of_lies", "word_sorting",
}  # fmt: skip


@pytest.fixture(scope="module")
def run() -> Iterator[Any]:
    """The module that runs it; several benchmarks have modules of one name."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("run")
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def build(run: Any) -> Any:
    return importlib.import_module("build")


@pytest.fixture
def costs(run: Any) -> Any:
    return importlib.import_module("costs")


def test_pool_targets_and_development_are_strangers(build: Any) -> None:
    pool, targets, development = (set(build.FAMILIES[name]) for name in ("pool", "targets", "development"))
    tasks = {task.split("/")[0] for tasks in build.FAMILIES["pool"].values() for task in tasks}
    assert tasks == pool
    assert len(pool) >= 80
    assert targets <= HARD
    assert len(targets) == 6
    assert not (pool | development) & HARD
    assert len(development) == 4
    assert not pool & development


def test_copies_are_a_tenth_each_and_name_what_they_repeat(build: Any) -> None:
    asked = [f"What is {i} plus {i}?" for i in range(100)]
    pool = [{"id": f"f-{i}", "prompt": text, "completion": str(2 * i)} for i, text in enumerate(asked)]
    copies = list(build._copies(pool, np.random.default_rng(0)))
    first = {row["id"]: row for row in pool}
    assert len({row["duplicate_of"] for row in copies}) == 20, "of different rows"
    kinds = [row["id"].removeprefix(f"{row['duplicate_of']}-") for row in copies]
    assert (kinds.count("exact"), kinds.count("near")) == (10, 10)
    for row, kind in zip(copies, kinds, strict=True):
        one = first[row["duplicate_of"]]
        assert row["completion"] == one["completion"]
        assert (row["prompt"] == one["prompt"]) == (kind == "exact")
        assert one["prompt"].lower().rstrip("?") in row["prompt"].lower()


@pytest.mark.parametrize("size", ["tiny", "standard", "large"])
def test_every_part_is_a_configuration(size: str, run: Any, costs: Any, tmp_path: Path) -> None:
    plan = run.load_plan(size)
    bench = run.Bench(tmp_path, size, plan, "cpu")
    assert set(plan["order"]) <= {*costs.parts_of(plan), "paper"}
    every: dict[str, None] = {}
    for name, settings in costs.parts_of(plan).items():
        evaluation = {**settings["evaluation"], "targets": bench.names(settings["evaluation"]["targets"])}
        made = {"run_dir": "r", "model": {"path": "m"}, "data": {"pool": "p", "target": None}}
        tree = costs.merged(costs.merged(plan["run"], made), {**settings, "evaluation": evaluation})
        every |= dict.fromkeys([*tree["selection"]["strategies"], *evaluation["strategies"]])
        tree["selection"]["strategies"] = list(every)
        tree["selection"]["target"] = "snarks"  # one that is added: the run's own is its pool
        config = build_config(tree, name)
        assert config.evaluation.strategies[0] == "gtp", "what the others are compared with"
    check_strategies(config)  # that of the last has all
    assert set(STRATEGIES) <= set(every)
    steps, batch = (plan["run"]["evaluation"][key] for key in ("steps", "batch_size"))
    if size != "tiny":
        assert steps * batch == 0.05 * run.SIZES[size].rows, "one pass over the largest budget"


def test_the_estimate_counts_every_training_once(costs: Any, build: Any) -> None:
    plan = {
        "run": {"evaluation": {"seeds": 2, "steps": 10, "batch_size": 8, "epochs": 1, "endpoints": ["base"]}},
        "parts": {},
    }
    count = costs.Count(plan, build.Size(pool=200, target=4, heldout=5, targets=2, development=1))
    grid = {"strategies": ["gtp", "random"], "targets": "TARGETS", "budgets": [0.05, 0.1]}
    # gtp: 2 targets × 2 budgets × 2 seeds; random: 2 budgets × 2 seeds, each scored on both targets; base
    assert count.add("grid", {"evaluation": grid}) == (12, 120, 5 * (8 + 8 + 2))
    assert count.add("again", {"evaluation": {**grid, "budgets": [0.05]}}) == (0, 0, 0)
    epochs = {**grid, "strategies": ["random"], "budgets": [0.1], "protocols": ["equal-epochs"]}
    full = {"evaluation": {**epochs, "endpoints": ["base", "full"]}}
    # 24 of 240 rows are 3 steps, all of them 30
    assert count.add("full", full) == (4, 2 * 3 + 2 * 30, 5 * (4 + 4))
    crossed = {**grid, "strategies": ["gtp"], "budgets": [0.05], "crossed": True}
    assert count.add("crossed", {"evaluation": crossed}) == (4, 40, 5 * 4), "the models are gone"
    assert count.add("own", {"warmup": {}, "evaluation": {**grid, "strategies": ["gtp"]}})[0] == 8


def test_defaults_are_compared_by_target_and_seed(run: Any, tmp_path: Path) -> None:
    head = ["target", "scored_on", "strategy", "budget", "seed", "loss", "exact_match"]
    noise = {("a", 0): 1.0, ("a", 1): 1.1, ("b", 0): 3.0, ("b", 1): 3.2}

    def write(part: str, worse: dict[str, float]) -> None:
        with (tmp_path / f"ablation-{part}.cells.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            writer.writerow(["a", "a", "base", "", 0, 9, 0])
            for name, by in worse.items():
                for (target, seed), loss in list(noise.items())[:: 1 if name == "gtp" else -1]:
                    writer.writerow([target, target, name, 96, seed, loss + by, 0.5])

    run.write_defaults(tmp_path)
    assert not (tmp_path / "defaults.md").exists()
    write("strategies", {"gtp": 0.0, "raw-rows": 0.25})
    write("weights", {"gtp": -0.5})
    run.write_defaults(tmp_path)
    lines = (tmp_path / "defaults.md").read_text().splitlines()
    log = np.mean([np.log((loss + 0.25) / loss) for loss in noise.values()])
    assert lines[-2].startswith(f"| raw-rows | 96 | 0.250 (0.250 to 0.250) | {log:.3f} (")
    assert "| 4/4 | 0.000" in lines[-2]
    assert lines[-1].startswith("| weights | 96 | -0.500 (-0.500 to -0.500) | -")
    assert "| 0/4 |" in lines[-1]
    noise |= {("a", 2): 1.2, ("b", 2): 3.1}
    write("strategies", {"gtp": 0.0, "raw-rows": 0.25})
    run.write_defaults(tmp_path)
    lines = (tmp_path / "defaults.md").read_text().splitlines()
    assert "| 6/6 |" in lines[-2]
    assert lines[-1].startswith("| weights | 96 | of other targets, seeds or budgets: run its part again |")


def test_an_estimate_needs_something_that_was_trained(costs: Any, run: Any, tmp_path: Path) -> None:
    plan = run.load_plan("tiny")
    with pytest.raises(DataError, match=r"results.jsonl: not there: the estimate is made from cells"):
        costs.estimate(tmp_path, plan, run.load_plan("standard"))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.jsonl").write_text("")
    with pytest.raises(DataError, match="nothing was trained yet"):
        costs.estimate(tmp_path, plan, run.load_plan("standard"))


def test_a_summary_counts_every_target_alike(run: Any, tmp_path: Path) -> None:
    head = ["target", "scored_on", "protocol", "strategy", "budget", "seed", "loss", "exact_match", "copies"]
    losses = {
        ("a", "gtp"): [1.0, 2.0],
        ("a", "less"): [2.0, 4.0],
        ("b", "gtp"): [10.0, 10.0],
        ("b", "less"): [5.0, 5.0],
    }
    with (tmp_path / "grid.cells.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows([name, name, "", "base", "", 0, 20.0, 0, ""] for name in "ab")
        for (target, name), values in losses.items():
            for seed, loss in enumerate(values):
                writer.writerow([target, target, "equal-steps", name, 48, seed, loss, 0.25, 3 if name == "less" else 0])
        writer.writerow(["a", "b", "equal-steps", "gtp", 48, 0, 99.0, 0.0, 0])  # crossed: chosen for another target
    run.write_summary(tmp_path, "grid")
    gtp, less = (tmp_path / "grid.summary.md").read_text().splitlines()[-2:]
    assert gtp.startswith("| equal-steps | gtp | 48 | 14.250 (")
    assert gtp.endswith("| – | – | – | 0.25 | 0.0 |")
    assert less.startswith("| equal-steps | less | 48 | 16.000 (")
    assert "| 0.000 (" in less, "twice and half the loss"
    assert "| 2/4 |" in less
    assert less.endswith("| 0.25 | 3.0 |")


def rows(family: str, count: int, start: int = 0) -> list[dict[str, Any]]:
    found = []
    for i in range(start, start + count):
        row = Job.row(i, family)
        found.append({"id": row["id"], "prompt": row["prompt"], "completion": row["completion"], "family": family})
    return found


@pytest.fixture
def bench(run: Any, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark with a tiny model, and rows that were built."""
    folder = tmp_path / "input"
    pool = [row for family in ("plus", "minus", "times") for row in rows(family, 20)]
    files = {"pool": [*pool, {**pool[3], "id": "copy", "duplicate_of": pool[3]["id"]}]}
    files["in-domain.heldout"] = rows("plus", 5, 20)
    for name in ("date_understanding", "disambiguation_qa", "hindu_knowledge"):
        files |= {f"{name}.target": rows(name, 6), f"{name}.heldout": rows(name, 5, 6)}
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "built.json").write_text(json.dumps({"sha256": {n: sha256_of(folder / f"{n}.jsonl") for n in files}}))
    monkeypatch.setattr(run, "smollm2", lambda _: tiny_path)
    plan = run.load_plan("tiny")
    plan["run"]["gradients"]["dim"] = 64
    plan["run"]["model"]["precision"] = "float32"
    plan["run"]["selection"]["strategies"] = ["gtp", "random-matched"]
    plan["run"]["evaluation"]["steps"] = 1
    plan["parts"]["control"]["evaluation"] |= {"accuracy": False}  # takes lm-eval, which is slow to import
    plan["parts"]["in-domain"]["evaluation"] |= {"strategies": ["gtp", "el2n"], "budgets": [0.1], "endpoints": ["base"]}
    return run.Bench(tmp_path, "tiny", plan, "cpu")


def test_parts_run_and_leave_their_tables(run: Any, bench: Any) -> None:
    run.prepare(bench)
    run.run_jobs(bench, run.everything(bench), ["control", "in-domain"])
    assert bench.problems == []

    def read(name: str) -> list[dict[str, str]]:
        with (bench.results / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    control = read("control.cells.csv")
    assert len(control) == 2 * 2 * 2, "base and gtp, for each of two targets, on each"
    (found,) = (d for d in read("control.differences.csv") if d["target"] == "all targets" and d["metric"] == "loss"
                and d["other"] == "gtp for others")  # fmt: skip
    mean = {own: np.mean([float(c["loss"]) for c in control if c["strategy"] == "gtp"
                          and (c["target"] == c["scored_on"]) is own]) for own in (True, False)}  # fmt: skip
    assert float(found["difference"]) == pytest.approx(mean[False] - mean[True], abs=2e-6)
    inside = read("in-domain.cells.csv")
    assert {c["target"] for c in inside} == {"own"}
    assert {c["strategy"] for c in inside} == {"base", "gtp", "el2n"}
    assert {c["examples"] for c in inside if c["strategy"] == "gtp"} == {"7"}, "10 % of 61"
    assert (bench.run_dir / "gradients" / "pool" / "el2n").is_dir(), "collected when it was asked for"
    assert json.loads((bench.results / "control.json").read_text())["machine"]["threads"] >= 1


def test_other_bytes_than_the_results_were_measured_with_are_refused(run: Any, bench: Any) -> None:
    run.prepare(bench)
    kept = bench.results / "built.json"
    record = json.loads(kept.read_text())
    record["sha256"]["pool"] = "0" * 64
    kept.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"input: pool is not what .*built\.json was measured with"):
        run.prepare(bench)
