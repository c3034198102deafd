"""Every budget from one pursuit: the chosen atoms pruned one step after the other, without another pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gradpursuit.errors import PursuitError, nearest
from gradpursuit.pursuit.loop import FINAL, Layer
from gradpursuit.pursuit.matrix import Float64Array, IntArray
from gradpursuit.pursuit.problem import PursuitProblem, SupportFit

_STEP = 0.8  # each rung of a ladder has this share of the atoms of the one above
_RULES = ("gain", "chord")
_GAIN = 0.95


@dataclass(frozen=True)
class Subset:
    """What a budget buys.

    support int64 [m]: atoms, by layer, then by falling contribution; layers int64 [m], from 1; weights float64 [m];
    relative_residual: ‖b − A w‖/‖b‖ of the first layer; objective of the first layer.
    """

    support: IntArray
    layers: IntArray
    weights: Float64Array
    relative_residual: float
    objective: float


class Knee(NamedTuple):
    """A budget beyond which more atoms help little, the rule that found it, and the residual there."""

    budget: int
    rule: str
    relative_residual: float


class Ladder:
    """One layer's fits from all its atoms down to one, each pruned from the one above."""

    def __init__(self, problem: PursuitProblem, fit: SupportFit) -> None:
        self._problem: PursuitProblem | None = problem
        self._rungs = [fit]
        self.size = len(fit.ids)

    def descend(self, count: int) -> SupportFit:
        """The fit with at most `count` atoms."""
        while len(self._rungs[-1].ids) > count:
            size = len(self._rungs[-1].ids)
            self._rungs.append(self._pruned(self._rungs[-1], max(1, min(size - 1, int(_STEP * size)))))
        rung = next(fit for fit in reversed(self._rungs) if len(fit.ids) >= min(count, self.size))
        return rung if len(rung.ids) <= count else self._pruned(rung, count)

    def rungs(self) -> list[SupportFit]:
        """All of them, the smallest first."""
        self.descend(1)
        return [fit for fit in reversed(self._rungs) if len(fit.ids)]

    def __getstate__(self) -> dict[str, Any]:
        """Without the matrix."""
        return {**self.__dict__, "_problem": None}

    def _pruned(self, fit: SupportFit, count: int) -> SupportFit:
        if self._problem is None:
            raise PursuitError(
                f"this path was stored without the matrix, so it has no subset of exactly {count} atoms; its budgets are "
                "in `path.budgets`."
            )
        ids = fit.ids[:count]  # in order of contribution
        self._problem.held.load(ids)
        return self._problem.fit(ids, fit.weights[:count], None, FINAL)


class BudgetPath:
    """The subsets for every budget up to that of the pursuit; only chosen columns are read for them, when asked for.

    Up to the size of the first layer a subset is the first layer pruned, contribution by contribution, and refitted;
    beyond it, whole layers and part of the next. With `targets="split"` each target has its share of the budget.

    Index it with a budget: ``path[100].support``. Iterating gives (budget, Subset) on a grid, the smallest first.
    """

    def __init__(self, parts: list[tuple[PursuitProblem, list[Layer]]]) -> None:
        self._parts = [_PartPath(problem, layers) for problem, layers in parts]

    def __len__(self) -> int:
        """The largest budget."""
        return sum(part.size for part in self._parts)

    def __getitem__(self, budget: int) -> Subset:
        """The subset for a budget of 1 to `len(path)` atoms (all of them beyond)."""
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or budget < 1:
            raise PursuitError(f"the budget is {budget!r}; it must be an integer from 1 to {len(self)}.")
        shares = share_out(int(budget), len(self._parts))
        return merged([part.subset(share) for part, share in zip(self._parts, shares, strict=True) if share])

    def __iter__(self) -> Iterator[tuple[int, Subset]]:
        """(budget, subset) on the grid."""
        return ((budget, self[budget]) for budget in self.budgets)

    def whole(self) -> Subset:
        """The subset of the whole budget."""
        return merged([part.subset(part.size) for part in self._parts])

    @property
    def budgets(self) -> list[int]:
        """A grid of budgets: every fifth atom fewer than the one before, and the ends of layers."""
        sizes = {size for part in self._parts for size in part.sizes}
        return sorted({min(size * len(self._parts), len(self)) for size in sizes})

    def knee(self, rule: str = "gain") -> Knee:
        """A budget within the first layer beyond which more atoms help little.

        rule "gain": the smallest on the grid with 95 % of all that the layer gains in the objective. "chord": where the
        curve of the objective lies furthest below the straight line between its ends (Satopää, Albrecht, Irwin,
        Raghavan, "Finding a 'kneedle' in a haystack", 2011).
        """
        if rule not in _RULES:
            raise PursuitError(f"rule is {rule!r}; {nearest(str(rule), _RULES)}")
        if not len(self):
            raise PursuitError("the support is empty, so there is no budget to propose.")
        sizes, objectives, residuals = self._parts[0].curve()
        gain = (objectives[0] - objectives) / (objectives[0] - objectives[-1])
        place = int(np.argmax(gain >= _GAIN)) if rule == "gain" else int(np.argmax(gain - sizes / sizes[-1]))
        place = max(place, 1)
        return Knee(int(sizes[place]) * len(self._parts), rule, float(residuals[place]))


class _PartPath:
    """The path of one target, or of several with a common support."""

    def __init__(self, problem: PursuitProblem, layers: list[Layer]) -> None:
        self._problem: PursuitProblem | None = problem
        self._scale = problem.target_norms / len(problem.target_norms)
        self._unit, self._empty = problem.unit, problem.empty()
        self._ladders = [Ladder(problem, layer.fit) for layer in layers if len(layer.fit.ids)]
        self.size = sum(ladder.size for ladder in self._ladders)

    @property
    def sizes(self) -> list[int]:
        """The sizes of the first layer's rungs, and where the layers end."""
        ends = np.cumsum([ladder.size for ladder in self._ladders]).tolist()
        return [*self.curve()[0].astype(int).tolist()[1:], *ends]

    def curve(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Sizes, objectives and relative residuals of the first layer, from nothing to all of it."""
        fits = [self._empty, *(self._ladders[0].rungs() if self._ladders else [])]
        self._release()
        values = [(len(fit.ids), fit.objective, fit.relative_residual) for fit in fits]
        sizes, objectives, residuals = (np.array(column, dtype=float) for column in zip(*values, strict=True))
        return sizes, objectives, residuals

    def subset(self, budget: int) -> Subset:
        """The atoms for `budget`, of all layers, with one weight each in the units of the target (or targets' mean)."""
        fits = []
        for ladder in self._ladders:
            if budget > 0:
                fits.append(ladder.descend(budget))
                budget -= len(fits[-1].ids)
        self._release()
        first = fits[0] if fits else self._empty
        every = fits or [self._empty]
        return Subset(
            np.concatenate([fit.ids for fit in every]),
            np.repeat(np.arange(1, len(every) + 1), [len(fit.ids) for fit in every]),
            np.concatenate([fit.weights @ self._scale for fit in every]),
            first.relative_residual,
            first.objective * self._unit,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the matrix: what is stored knows the budgets of its grid alone, all made now."""
        for ladder in self._ladders:
            ladder.descend(1)
        self._release()
        return {**self.__dict__, "_problem": None}

    def _release(self) -> None:
        if self._problem is not None:
            self._problem.held.release()


def merged(parts: list[Subset]) -> Subset:
    """The union of several targets' subsets: weights are averaged over targets, an atom keeps its lowest layer."""
    if len(parts) == 1:
        return parts[0]
    every = np.concatenate([part.support for part in parts])
    support, place = np.unique(every, return_inverse=True)
    weights = np.bincount(place, np.concatenate([part.weights for part in parts])) / len(parts)
    layers = np.full(len(support), np.iinfo(np.int64).max)
    np.minimum.at(layers, place, np.concatenate([part.layers for part in parts]))
    order = np.lexsort((support, -weights, layers))
    residual = float(np.sqrt(np.mean([part.relative_residual**2 for part in parts])))
    objective = float(np.mean([part.objective for part in parts]))
    return Subset(support[order], layers[order], weights[order], residual, objective)


def share_out(budget: int, parts: int) -> list[int]:
    """The budget in `parts` shares that differ by at most one."""
    return [budget // parts + (part < budget % parts) for part in range(parts)]
