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

    Attributes:
        support: int64 [m], atoms, by layer, then by falling contribution.
        layers: int64 [m], from 1.
        weights: float64 [m].
        relative_residual: ‖b − A w‖/‖b‖ of the first layer; of several targets, each with its own weights, the root
            of the mean square.
        objective: of the first layer; of several targets the mean.
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
        self._problem = problem
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

    def _pruned(self, fit: SupportFit, count: int) -> SupportFit:
        largest = self._problem.ranked(fit.ids, fit.weights)[:count]
        self._problem.held.load(fit.ids[largest])
        return self._problem.fit(fit.ids[largest], fit.weights[largest], None, FINAL)


class BudgetPath:
    """The subsets for every budget up to that of the pursuit; only chosen columns are read for them, when asked for.

    Up to the size of the first layer a subset is the first layer pruned, contribution by contribution, and refitted;
    beyond it, whole layers and part of the next. With `targets="split"` each target has an equal share of the budget,
    or all its atoms if they are fewer.

    Index it with a budget: ``path[100].support``. Iterating gives (budget, Subset) on a grid, the smallest first.
    A pickled path keeps its grid, not the matrix: loaded again, it has the budgets of the grid alone.
    """

    def __init__(self, parts: list[tuple[PursuitProblem, list[Layer]]]) -> None:
        self._parts = [_PartPath(problem, layers) for problem, layers in parts]
        self._stored: dict[int, Subset] = {}

    def __len__(self) -> int:
        """The largest budget."""
        return max(self._stored) if self._stored else sum(part.size for part in self._parts)

    def __getitem__(self, budget: int) -> Subset:
        """The subset for a budget of 1 to `len(path)` atoms (all of them beyond)."""
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)) or budget < 1:
            raise PursuitError(f"the budget is {budget!r}; it must be an integer from 1 to {len(self)}.")
        return self._subset(min(int(budget), len(self)))

    def __iter__(self) -> Iterator[tuple[int, Subset]]:
        """(budget, subset) on the grid."""
        return ((budget, self[budget]) for budget in self.budgets)

    def whole(self) -> Subset:
        """The subset of the whole budget."""
        return self._subset(len(self))

    @property
    def budgets(self) -> list[int]:
        """A grid of budgets: every fifth atom fewer than the one before, and the ends of layers."""
        if self._stored:
            return sorted(budget for budget in self._stored if budget)
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
        first_layer = ((budget, subset) for budget, subset in self if (subset.layers == 1).all())
        budgets, subsets = zip((0, self._subset(0)), *first_layer, strict=True)
        objectives, sizes = np.array([subset.objective for subset in subsets]), np.array(budgets)
        gain = (objectives[0] - objectives) / (objectives[0] - objectives[-1])
        place = int(np.argmax(gain >= _GAIN)) if rule == "gain" else int(np.argmax(gain - sizes / sizes[-1]))
        place = max(place, 1)
        return Knee(budgets[place], rule, subsets[place].relative_residual)

    def __getstate__(self) -> dict[str, Any]:
        """The subsets of the grid, and that of nothing, without the matrix."""
        return {"_parts": [], "_stored": self._stored or {0: self._subset(0), **dict(self)}}

    def _subset(self, budget: int) -> Subset:
        """The subset for a budget of 0 to `len(self)`."""
        if not self._stored:
            shares = self._shares(budget)
            subsets = [part.subset(share) for part, share in zip(self._parts, shares, strict=True)]
            return merged(subsets, self._parts[0].norms)
        if budget not in self._stored:
            raise PursuitError(
                f"this path was stored without the matrix, so it has no subset for a budget of {budget}; those it has "
                "are in `path.budgets`."
            )
        return self._stored[budget]

    def _shares(self, budget: int) -> list[int]:
        """How much of the budget each target gets: as much as the others, or all that it has."""
        shares = [0] * len(self._parts)
        while budget:
            wanting = [place for place, part in enumerate(self._parts) if shares[place] < part.size]
            for place, more in zip(wanting, share_out(budget, len(wanting)), strict=True):
                given = min(more, self._parts[place].size - shares[place])
                shares[place] += given
                budget -= given
        return shares


class _PartPath:
    """The path of one target, or of several with a common support."""

    def __init__(self, problem: PursuitProblem, layers: list[Layer]) -> None:
        self._problem, self.norms = problem, problem.norms
        self._scale = problem.target_norms / len(problem.target_norms)
        self._ladders = [Ladder(problem, layer.fit) for layer in layers if len(layer.fit.ids)]
        self.size = sum(ladder.size for ladder in self._ladders)

    @property
    def sizes(self) -> list[int]:
        """The sizes of the first layer's rungs, and where the layers end."""
        if not self._ladders:
            return []
        rungs = [len(fit.ids) for fit in self._ladders[0].rungs()]
        self._problem.held.release()
        return [*rungs, *np.cumsum([ladder.size for ladder in self._ladders]).tolist()]

    def subset(self, budget: int) -> Subset:
        """The atoms for `budget`, of all layers, with one weight each in the units of the target (or targets' mean)."""
        fits = []
        for ladder in self._ladders:
            if budget > 0:
                fits.append(ladder.descend(budget))
                budget -= ladder.size  # which part of a layer may leave unused: the next waits for the whole of it
        self._problem.held.release()
        every = fits or [self._problem.empty()]
        first = every[0]
        return Subset(
            np.concatenate([fit.ids for fit in every]),
            np.repeat(np.arange(1, len(every) + 1), [len(fit.ids) for fit in every]),
            np.concatenate([fit.weights @ self._scale for fit in every]),
            first.relative_residual,
            first.objective * self._problem.unit,
        )


def merged(parts: list[Subset], norms: Float64Array) -> Subset:
    """The union of several targets' subsets: weights are averaged over targets, an atom keeps its lowest layer.

    norms [N]: the lengths of all atoms. relative_residual: root of the mean square over targets; objective: mean.
    """
    if len(parts) == 1:
        return parts[0]
    every = np.concatenate([part.support for part in parts])
    support, place = np.unique(every, return_inverse=True)
    weights = np.bincount(place, np.concatenate([part.weights for part in parts])) / len(parts)
    layers = np.full(len(support), np.iinfo(np.int64).max)
    np.minimum.at(layers, place, np.concatenate([part.layers for part in parts]))
    order = np.lexsort((support, -weights * norms[support], layers))
    residual = float(np.sqrt(np.mean([part.relative_residual**2 for part in parts])))
    objective = float(np.mean([part.objective for part in parts]))
    return Subset(support[order], layers[order], weights[order], residual, objective)


def share_out(budget: int, parts: int) -> list[int]:
    """The budget in `parts` shares that differ by at most one."""
    return [budget // parts + (part < budget % parts) for part in range(parts)]
