"""The pursuit of one target: merge, fit, prune, refit, in as many layers as the budget needs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gradpursuit.pursuit.candidates import CandidatePool
from gradpursuit.pursuit.matrix import IntArray
from gradpursuit.pursuit.newton import Tolerance
from gradpursuit.pursuit.problem import JOIN, MATCHED, PursuitProblem, SupportFit

logger = logging.getLogger("gradpursuit")

# Where no Gram matrix makes the exact solution cheap, a refit ends when its steps gain little, until the last: which
# atoms have weight shows long before the weights are exact, and the objective is that of the weights as they are.
_MERGE = Tolerance(1e-5, gain=0.1)
FINAL = Tolerance(1e-7)
_FILLING = 1e-6


class PursuitStep(NamedTuple):
    """The state of a pursuit after an accepted iteration (iteration 0 is w = 0, or where a warm start begins).

    layer and iteration count from 1; relative_residual is ‖b − A w‖/‖b‖ and objective ½‖b − A w‖² + ½λ‖w‖² of the
    layer; seconds since the pursuit began; bytes_read from the matrix since then, by passes and for columns.
    """

    layer: int
    iteration: int
    support_size: int
    relative_residual: float
    objective: float
    seconds: float
    bytes_read: int


Callback = Callable[[PursuitStep, IntArray], object]


@dataclass
class Layer:
    """One pursuit of the target: its last fit, the accepted fits as records, its passes, and why it ended."""

    fit: SupportFit
    steps: list[PursuitStep]
    n_iter: int = 0
    stop_reason: str = "interrupted"


class Steps:
    """Records, logs and tells the accepted iterations of a pursuit of `problem`.

    before: those of the pursuit before this one, whose seconds and bytes go on.
    """

    def __init__(self, problem: PursuitProblem, callback: Callback | None, before: Steps | None = None) -> None:
        self._problem, self._callback = problem, callback
        self._began: float = before._began if before else time.perf_counter()
        self._read_before = before._bytes_read - problem.bytes_read if before else 0  # the norms are read once

    @property
    def _bytes_read(self) -> int:
        return self._read_before + self._problem.bytes_read

    def measure(self, layer: Layer, number: int, iteration: int) -> PursuitStep:
        """The state of layer `number` after `iteration`."""
        fit, seconds = layer.fit, time.perf_counter() - self._began
        numbers = (number, iteration, len(fit.ids), fit.relative_residual)
        return PursuitStep(*numbers, fit.objective * self._problem.unit, seconds, self._bytes_read)

    def record(self, layer: Layer, number: int, iteration: int) -> None:
        """Add the fit of layer `number` after `iteration` to its steps, and tell it."""
        step = self.measure(layer, number, iteration)
        layer.steps.append(step)
        logger.info(
            "pursuit layer %d iteration %d: %d atoms, relative residual %.6f, relative objective %.6g, %.1f s",
            *step[:4],
            2 * layer.fit.objective,
            step.seconds,
            extra={"progress": True},
        )
        if self._callback is not None:
            self._callback(step, layer.fit.ids.copy())


@dataclass
class Pursuit:
    """One target pursued: the problem, the pool of atoms still free, and the layers so far.

    max_iter, tol, saturation: as in :class:`GradientTrajectoryPursuit`.
    """

    problem: PursuitProblem
    pool: CandidatePool
    max_iter: int
    tol: float
    saturation: str
    steps: Steps
    layers: list[Layer] = field(default_factory=list)
    interrupted: bool = False

    def run(self, budget: int, starts: list[SupportFit]) -> None:
        """Pursue layer after layer until `budget` atoms are chosen; layer i begins from `starts[i]` if there is one.

        An interrupt (Ctrl-C) ends it with the best support so far.
        """
        try:
            while budget > 0:
                start = starts[len(self.layers)] if len(self.layers) < len(starts) else None
                self._pursue(budget, start)
                chosen = self.layers[-1].fit.ids
                budget -= len(chosen)
                self.pool.take(chosen)
                if not len(chosen) or self.saturation == "stop":
                    break
        except KeyboardInterrupt:
            self.interrupted = True
            logger.warning("interrupted: the pursuit ends with the best support so far")
            self.problem.held.release()  # it may have been interrupted half-way through a change
        self._polish()

    def _pursue(self, budget: int, start: SupportFit | None) -> None:
        """One layer: at most `budget` atoms of the pool."""
        layer = Layer(self.problem.empty(), [])
        self.layers.append(layer)
        layer.fit = best = self._begin(budget, start)
        self.steps.record(layer, len(self.layers), 0)
        most = max(1, round(JOIN * budget))
        count = most
        for passes in range(1, self.max_iter + 1):
            layer.n_iter = passes
            ranking, better, joined = self.problem.ranking(best), None, 0
            for tried in dict.fromkeys((count, most)):  # not before the most were tried has it converged
                free = ranking.without(self.pool.excluded(best.ids))
                candidates = self.pool.draw(free, best.ids, tried)
                if not candidates.size:
                    layer.stop_reason = "no positive correlation"
                    return
                better, joined = self._improve(best, candidates, budget)
                if better is not None:
                    break
            if better is None:
                layer.stop_reason = "converged" if len(best.ids) == budget else "saturated"
                return
            count = min(most, 2 * joined)
            self.problem.held.keep(np.concatenate([self.pool.taken, best.ids, better.ids]))
            layer.fit = best = better
            self.steps.record(layer, len(self.layers), passes)
            if best.relative_residual <= MATCHED:
                layer.stop_reason = "target matched"
                return
        layer.stop_reason = "iteration limit"

    def _begin(self, budget: int, start: SupportFit | None) -> SupportFit:
        if start is None:
            return self.problem.empty()
        free = self.pool.free(start.ids)  # an earlier layer may have taken some of them, or copies, this time
        ids, weights = start.ids[free], start.weights[free]
        q = self.problem.targets.shape[1]
        if weights.shape[1] != q:
            weights = np.repeat(weights.mean(axis=1, keepdims=True), q, axis=1)
        self.problem.held.load(ids)
        return self.problem.fit(ids, weights, budget, _MERGE) if len(ids) else self.problem.empty()

    def _improve(self, best: SupportFit, candidates: IntArray, budget: int) -> tuple[SupportFit | None, int]:
        """Merge, fit, prune, refit; with fewer candidates as long as the objective does not fall."""
        # Until the budget is full every gain counts: to end then is to say that no other atom can have weight.
        tol = self.tol if len(best.ids) == budget else min(self.tol, _FILLING)
        while candidates.size:
            merged = np.concatenate([best.ids, candidates])
            start = np.concatenate([best.weights, np.zeros((candidates.size, best.weights.shape[1]))])
            fit = self.problem.fit(merged, start, budget, _MERGE)
            if fit.improves(best, tol):
                return fit, candidates.size
            candidates = candidates[: candidates.size // self.problem.pace.fewer]
        return None, 0

    def _polish(self) -> None:
        """The exact weights of every layer, which the pursuit itself did not need."""
        for number, layer in enumerate(self.layers, 1):
            if not layer.steps:  # interrupted before the first
                layer.steps.append(self.steps.measure(layer, number, 0))
            if layer.fit.kkt > FINAL.least:
                self.problem.held.load(layer.fit.ids)
                layer.fit = self.problem.fit(layer.fit.ids, layer.fit.weights, None, FINAL)
                if layer.fit.relative_residual <= MATCHED:
                    layer.stop_reason = "target matched"
                layer.steps[-1] = layer.steps[-1]._replace(
                    support_size=len(layer.fit.ids),
                    relative_residual=layer.fit.relative_residual,
                    objective=layer.fit.objective * self.problem.unit,
                )
