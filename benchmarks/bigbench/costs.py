"""What the benchmark costs: every training counted once, whatever parts ask for it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from build import FAMILIES, SIZES, Size

from gradpursuit.config import rows_of
from gradpursuit.errors import DataError
from gradpursuit.files import read_json

Tree = dict[str, Any]
TARGET_FREE = ("random", "el2n", "grand", "learning-percentage", "kmeans-quality", "full")  # one subset for all targets
CHOICES = 4  # a row scored with its choices takes about this much longer: it is read once for each
ITERATIONS = 5  # of the pursuit, whose supports `paper` trains on: a guess


def merged(left: Mapping[str, Any], right: Mapping[str, Any]) -> Tree:
    """Nested settings, those on the right first."""
    both = dict(left)
    for key, value in right.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = merged(both[key], value) if nested else value
    return both


def parts_of(plan: Tree) -> Tree:
    """The settings of every part and ablation, by name."""
    ablations = {f"ablation-{name}": merged(plan["ablation"], own) for name, own in plan["ablations"].items()}
    return {**plan["parts"], **ablations}


def target_names(size: Size, value: str | Sequence[str]) -> list[str]:
    """The targets that TARGETS, EVERY, SOME and DEVELOPMENT stand for."""
    targets = FAMILIES["targets"][: size.targets]
    known = {
        "TARGETS": targets,
        "EVERY": ["own", *targets],
        "SOME": targets[:3],
        "DEVELOPMENT": FAMILIES["development"][: size.development],
    }
    return known[value] if isinstance(value, str) else list(value)


class Count:
    """Optimizer steps and scored rows of parts, one after the other; what an earlier one has done is not done again."""

    def __init__(self, plan: Tree, size: Size) -> None:
        self._plan, self._size = plan, size
        self._known: dict[tuple[Any, str], bool] = {}  # by training and scored target: whether with accuracy

    def add(self, name: str, settings: Tree) -> tuple[int, int, int]:
        """Trainings, optimizer steps and scored rows (a row with choices counts as several) that a part adds."""
        wanted = merged(self._plan["run"], settings)["evaluation"]
        accuracy = bool(wanted.get("accuracy"))
        place = name if {"warmup", "gradients"} & settings.keys() else ""
        cells = set(self._cells(wanted, place))
        missing = [cell for cell in cells if self._known.get((cell[0], cell[2]), -1) < accuracy]
        self._known |= {(key, scored_on): accuracy for key, _, scored_on in missing}
        steps = {key: length for key, length, _ in missing if length}
        rows = len(missing) * self._size.heldout * (CHOICES if accuracy else 1)
        return len(steps), sum(steps.values()), rows

    def _cells(self, wanted: Tree, place: str) -> Iterator[tuple[Any, int, str]]:
        """What a training is made of, its steps (0: the base model), and the target that is scored."""
        targets = target_names(self._size, wanted["targets"])
        batch, weighted = wanted["batch_size"], wanted.get("use_weights", False)
        for target in targets:
            scored = targets if wanted.get("crossed") else [target]
            yield from (("base", 0, other) for other in scored)
            arms = [(s, rows_of(share, self._size.rows)) for s in wanted["strategies"] for share in wanted["budgets"]]
            for strategy, k in [*arms, *([("full", self._size.rows)] if "full" in wanted["endpoints"] else [])]:
                for protocol in wanted.get("protocols", ["equal-steps"]):
                    passes = wanted["epochs"] * math.ceil(k / batch)
                    steps = passes if protocol == "equal-epochs" else wanted["steps"]
                    whose = "" if strategy in TARGET_FREE else target
                    for seed in range(wanted["seeds"]):
                        key = (place if strategy not in TARGET_FREE else "", strategy, whose, k, steps, seed, weighted)
                        yield from ((key, steps, other) for other in scored)

    def paper(self) -> tuple[int, int, int]:
        """The same of the supports of the pursuit's iterations."""
        paper = self._plan["paper"]
        count = len(target_names(self._size, paper["targets"])) * paper["seeds"] * ITERATIONS
        return count, count * self._plan["run"]["evaluation"]["steps"], count * self._size.heldout


def estimate(run_dir: Path, measured: Tree, plan: Tree) -> str:
    """Hours of every part of the standard size, from what cells of a run folder took, whatever its size.

    Args:
        run_dir: with a manifest and evaluation/results.jsonl.
        measured: the plan that it was run with.
        plan: of the standard size.

    Raises:
        DataError: nothing was trained there.
    """
    per_row, per_score = _seconds(run_dir / "evaluation" / "results.jsonl", measured["run"]["evaluation"]["batch_size"])
    size, manifest = SIZES["standard"], read_json(run_dir / "manifest.json")["stages"]
    batch, warmup = plan["run"]["evaluation"]["batch_size"], plan["run"]["warmup"]
    ratio = size.rows / manifest["data"]["detail"]["rows"]["pool"]
    ratio *= warmup["checkpoints"] / measured["run"]["warmup"]["checkpoints"]
    prepared = ratio * manifest["gradients"]["seconds"] + warmup["epochs"] * warmup["fraction"] * size.rows * per_row
    lines = [f"{per_row * batch:.2f} s a step of {batch} rows, {per_score:.3f} s a scored row"]
    lines.append(f"{'warm-up and gradients':24s} {'':28s} {prepared / 3600:5.2f} h")
    count, total, parts = Count(plan, size), prepared, parts_of(plan)
    for name in plan["order"]:
        trainings, steps, rows = count.paper() if name == "paper" else count.add(name, parts[name])
        seconds = steps * batch * per_row + rows * per_score
        if "warmup" in parts.get(name, {}) or "gradients" in parts.get(name, {}):
            seconds += prepared * merged(plan["run"], parts[name])["warmup"]["checkpoints"] / warmup["checkpoints"]
        total += seconds
        lines.append(f"{name:24s} {trainings:4d} trainings, {steps:5d} steps {seconds / 3600:5.2f} h")
    return "\n".join([*lines, f"{'all':24s} {'':28s} {total / 3600:5.2f} h"])


def _seconds(results: Path, batch: int) -> tuple[float, float]:
    """Of a row in training, by the longest trainings (of short ones most is their beginning), and of one scored.

    Raises:
        DataError: nothing was trained yet.
    """
    if not results.is_file():
        raise DataError(f"{results}: not there: the estimate is made from cells that were run; run a part first")
    found = [json.loads(line)["result"] for line in results.read_text("utf-8").splitlines()]
    trained = [r for r in found if r["train_seconds"] and r["steps"]]
    if not trained:
        raise DataError(f"{results}: nothing was trained yet, from which an estimate could be made; run a part first")
    longest = [r for r in trained if 2 * r["steps"] >= max(r["steps"] for r in trained)]
    per_row = sum(r["train_seconds"] for r in longest) / (batch * sum(r["steps"] for r in longest))
    scored = sum(len(r["losses"]) * (1 if r["correct"] is None else CHOICES) for r in found)
    return per_row, sum(r["score_seconds"] for r in found) / scored
