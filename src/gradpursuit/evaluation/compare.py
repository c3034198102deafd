"""Fine-tune the model anew on every subset, with the same steps and seeds, and score held-out target examples."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from gradpursuit.aside import unfinished
from gradpursuit.config import EvaluationSection
from gradpursuit.data import Row, Table
from gradpursuit.evaluation.journal import Journal, Result
from gradpursuit.evaluation.scoring import Scorer
from gradpursuit.files import write_json
from gradpursuit.manifest import digest_of
from gradpursuit.progress import clock
from gradpursuit.selection import Selection, derive_seed
from gradpursuit.trajectory.model import Compute
from gradpursuit.trajectory.training import TrainSpec, train

logger = logging.getLogger("gradpursuit")
BASE, FULL = "base", "full"  # end points: the model before any fine-tuning, and trained on all that could be chosen


@dataclass(frozen=True)
class Arm:
    """What to train on.

    Attributes:
        strategy: whose subset, or `base` or `full`.
        target: the target it was chosen for.
        budget: k, the examples asked for; 0 for an end point.
        draws: the subsets; run s trains on draw s, or on the only one. None for `base`.
    """

    strategy: str
    target: str
    budget: int
    draws: Sequence[Selection]


@dataclass(frozen=True)
class Cell:
    """One fine-tuning run, scored on one target.

    Attributes:
        arm: what it was trained on.
        protocol: `equal-steps` or `equal-epochs`; empty for the base model.
        seed: number of the run, from 0; `base` has only 0.
        scored_on: the target whose held-out rows were scored.
        result: steps, scores of every row, times.
    """

    arm: Arm
    protocol: str
    seed: int
    scored_on: str
    result: Result

    @property
    def selection(self) -> Selection | None:
        """The subset it was trained on."""
        return _draw(self.arm, self.seed)

    @property
    def loss(self) -> float:
        """Mean over held-out rows, in nats per supervised token."""
        return float(np.mean(self.result.losses))

    @property
    def exact_match(self) -> float:
        """Share of held-out rows."""
        return float(np.mean(self.result.matches))

    @property
    def accuracy(self) -> float | None:
        """Share of held-out rows whose right choice is the most likely one."""
        return None if self.result.correct is None else float(np.mean(self.result.correct))


@dataclass(frozen=True)
class Wanted:
    """A cell to compute: everything but its result."""

    arm: Arm
    protocol: str
    seed: int
    scored_on: str
    training: str
    steps: int


@dataclass(frozen=True)
class Setting:
    """What all cells of a comparison share.

    Attributes:
        tuned: makes, from a seed, the model to fine-tune, fresh for each run; outside the block it is gone again.
        compute: device and precision.
        scorer: scores a model.
        pool: rows that the selections index.
        heldout: by target, the rows scored, never trained on.
        config: of the evaluation.
        seed: of the whole run; adapters and orders derive from it, the same for every strategy.
        origin: what tells the model and its adapter from others, as JSON values.
    """

    tuned: Callable[[int], AbstractContextManager[nn.Module]]
    compute: Compute
    scorer: Scorer
    pool: Table
    heldout: Mapping[str, Table]
    config: EvaluationSection
    seed: int
    origin: Mapping[str, Any]


class Comparison:
    """Cells arms × protocols × seeds (× targets, if crossed), each computed once and kept in a journal.

    Arms with the same rows, steps and seed (`random` for two targets) are one training, scored on both targets.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting, self._config = setting, setting.config
        self._row_digests: dict[int, str] = {}

    def plan(self, arms: Sequence[Arm]) -> list[Wanted]:
        """Every cell, in the order of computing: the base model, then seed after seed, the full pool at the end."""
        steps = self._equal_steps(arms)
        ordered = [
            *((arm, "", 0) for arm in arms if arm.strategy == BASE),
            *self._runs([arm for arm in arms if arm.strategy not in (BASE, FULL)]),
            *self._runs([arm for arm in arms if arm.strategy == FULL]),
        ]
        made = []
        for arm, protocol, seed in ordered:
            spec = self._spec(arm, protocol, seed, steps)
            key = self._training(arm, seed, spec)
            scored = list(self._setting.heldout) if self._config.crossed else [arm.target]
            made += [Wanted(arm, protocol, seed, target, key, spec.steps if spec else 0) for target in scored]
        return made

    def run(self, arms: Sequence[Arm], folder: Path) -> list[Cell]:
        """All cells; those in `folder/results.jsonl` are taken from there, and every new one is added to it."""
        journal, plan = Journal(folder / "results.jsonl"), self.plan(arms)
        journal.take_over(unfinished(folder) / "results.jsonl")
        keys = dict.fromkeys((w.training, self._scored[w.scored_on]) for w in plan)
        groups: dict[str, list[Wanted]] = {}
        for wanted in plan:
            groups.setdefault(wanted.training, []).append(wanted)
        open_ones = [group for group in groups.values() if self._missing(group, journal)]
        if len(open_ones) < len(groups):
            logger.info("%d of %d trainings are there already", len(groups) - len(open_ones), len(groups))
        start = time.monotonic()
        write_json(folder / "plan.json", [list(key) for key in keys])
        for done, group in enumerate(open_ones, 1):
            for result in self._compute(group[0], self._missing(group, journal)):
                journal.add(result)
                logger.info("%s: held-out loss %.4f, exact match %.3f", _told(result.label), *_means(result))
            left = (time.monotonic() - start) / done * (len(open_ones) - done)
            logger.info("training %d of %d done, %s left", done, len(open_ones), clock(left))
        return [
            Cell(w.arm, w.protocol, w.seed, w.scored_on, found)
            for w in plan
            if (found := journal.get(w.training, self._scored[w.scored_on])) is not None
        ]

    @cached_property
    def _scored(self) -> dict[str, str]:
        """Digest of the held-out rows of every target."""
        return {name: digest_of([_row_digest(row) for row in rows]) for name, rows in self._setting.heldout.items()}

    def _runs(self, arms: Sequence[Arm]) -> Iterator[tuple[Arm, str, int]]:
        for seed in range(self._config.seeds):
            for protocol in self._config.protocols:
                yield from ((arm, protocol, seed) for arm in arms)

    def _equal_steps(self, arms: Sequence[Arm]) -> int:
        config, largest = self._config, max((arm.budget for arm in arms), default=0)
        return config.steps or config.epochs * max(1, math.ceil(largest / config.batch_size))

    def _spec(self, arm: Arm, protocol: str, seed: int, steps: int) -> TrainSpec | None:
        """How to train; with equal epochs the budget counts, not how many of it a strategy chose. None: not at all."""
        if arm.strategy == BASE:
            return None
        config, derived = self._config, derive_seed(self._setting.seed, f"evaluation-{seed}")
        what = f"fine-tune on {arm.strategy}, seed {seed}"
        if protocol == "equal-steps":
            return TrainSpec(steps, config.batch_size, config.learning_rate, derived, what)
        rows = arm.budget or len(_draw(arm, seed).indices)  # type: ignore[union-attr]
        return TrainSpec.for_epochs(rows, config.epochs, config.batch_size, config.learning_rate, derived, what)

    def _training(self, arm: Arm, seed: int, spec: TrainSpec | None) -> str:
        """Digest of everything that decides what a training gives."""
        compute, selection = self._setting.compute, _draw(arm, seed)
        value: dict[str, Any] = {
            "origin": self._setting.origin,
            "arithmetic": [compute.device.type, str(compute.autocast)],
        }
        if spec and selection is not None:
            value |= {"steps": spec.steps, "batch": spec.batch_size, "rate": spec.learning_rate, "seed": spec.seed}
            value["rows"] = hashlib.sha256("".join(map(self._digest, selection.indices.tolist())).encode()).hexdigest()
            value["weights"] = selection.weights.tolist() if self._config.use_weights else None
        return digest_of(value)

    def _digest(self, index: int) -> str:
        if index not in self._row_digests:
            self._row_digests[index] = _row_digest(self._setting.pool[index])
        return self._row_digests[index]

    def _missing(self, group: Sequence[Wanted], journal: Journal) -> list[Wanted]:
        """Those of a training's cells that must be computed, one for each target."""
        wanted = {self._scored[w.scored_on]: w for w in reversed(group)}
        accuracy = self._config.accuracy
        return [w for scored, w in wanted.items() if not journal.get(w.training, scored, accuracy=accuracy)]

    def _compute(self, first: Wanted, wanted: Sequence[Wanted]) -> Iterator[Result]:
        setting, arm, start = self._setting, first.arm, time.monotonic()
        seed = derive_seed(setting.seed, f"evaluation-{first.seed}")
        with setting.tuned(seed) as model:
            selection = _draw(arm, first.seed)
            if selection is not None:
                spec = self._spec(arm, first.protocol, first.seed, first.steps)
                assert spec is not None  # only the base model has none
                weights = selection.weights.tolist() if self._config.use_weights else None
                train(model, setting.pool.take(selection.indices.tolist()), spec, setting.compute, weights=weights)
            seconds = time.monotonic() - start
            for w in wanted:
                start = time.monotonic()
                rows, what = setting.heldout[w.scored_on], f"score {arm.strategy}, seed {w.seed}, on {w.scored_on}"
                scores = setting.scorer(model, rows, what)
                yield Result(
                    training=w.training,
                    scored=self._scored[w.scored_on],
                    label=_label(w),
                    steps=w.steps,
                    losses=[round(loss, 6) for loss in scores.losses],
                    matches=scores.matches,
                    correct=scores.correct,
                    train_seconds=round(seconds, 3),
                    score_seconds=round(time.monotonic() - start, 3),
                    device=str(setting.compute),
                )
                seconds = 0.0


def _draw(arm: Arm, seed: int) -> Selection | None:
    return arm.draws[seed % len(arm.draws)] if arm.draws else None


def _row_digest(row: Row) -> str:
    return hashlib.sha256(repr((list(row.input_ids), list(row.labels))).encode()).hexdigest()


def _label(wanted: Wanted) -> dict[str, Any]:
    arm = wanted.arm
    return {
        "strategy": arm.strategy,
        "budget": arm.budget,
        "target": arm.target,
        "protocol": wanted.protocol,
        "seed": wanted.seed,
        "scored_on": wanted.scored_on,
    }


def _told(label: Mapping[str, Any]) -> str:
    budget = f", {label['budget']} examples" if label["budget"] else ""
    return f"{label['strategy']}{budget}, seed {label['seed']}, on {label['scored_on']}"


def _means(result: Result) -> tuple[float, float]:
    return float(np.mean(result.losses)), float(np.mean(result.matches))
