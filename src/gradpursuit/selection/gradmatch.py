"""`gradmatch`: orthogonal matching pursuit with a ridge, for every target group on its own."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from gradpursuit.config import MatchingSection, Number
from gradpursuit.errors import SelectionError
from gradpursuit.gradients.preconditioner import PreconditionerLabel
from gradpursuit.pursuit import GradMatch as Solver
from gradpursuit.pursuit.path import share_out
from gradpursuit.selection.base import Needs, Selection, SelectionProblem, Settings
from gradpursuit.selection.gtp import from_solver, preconditioner_of, pursuit_evidence, require_support, traffic_of
from gradpursuit.selection.scores import settings_of


class GradMatch(MatchingSection):
    """GradMatch (arXiv 2103.00123): OMP with λ = 0.5 until the residual is small, k/q examples for each of q groups.

    Simplified: the paper matches the gradient of a part of the training set (a class) with examples of that part, of
    the last layer, again at every few epochs; here a part is a target group, every pool row may serve any group, the
    gradients are those that the pursuit has, and the choice is made once. A row that several groups choose counts
    once, with the sum of its weights, so that the union may be smaller than k. Settings that are not given here are
    those of section `pursuit`.
    """

    source: ClassVar[str] = "Killamsetty et al., arXiv 2103.00123"
    stochastic: ClassVar[bool] = False

    preconditioner: PreconditionerLabel | None = Field(None, description="null: that of section gradients")
    alpha: Number = Field(0.5, ge=0, description="ridge λ, relative to the mean squared column norm")

    def needs(self, settings: Settings) -> Needs:
        """Gradients."""
        return Needs((preconditioner_of(self.preconditioner, settings),), target="mean", passes="k")

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """At most `k` examples, those that each group chose first leading.

        Raises:
            SelectionError: there are more groups than examples to choose, or nobody correlates with any group.
        """
        matrix, targets = problem.matching(self.preconditioner, settings_of(self, problem.pursuit), per_group=True)
        q = targets.shape[1]
        if k < q:
            raise SelectionError(f"gradmatch: {k} examples cannot be shared by {q} target groups; choose at least {q}")
        solvers = [
            Solver(share, alpha=self.alpha).fit(matrix, target)
            for share, target in zip(share_out(k, q), targets.T, strict=True)
        ]
        if q == 1:
            return from_solver(solvers[0], pursuit_evidence(solvers[0]) | traffic_of(matrix))
        support = np.array(_interleaved([solver.support_.tolist() for solver in solvers]), dtype=np.int64)
        require_support(support)
        weights = np.sum([solver.coef_[support] for solver in solvers], axis=0)
        evidence = _evidence_of(solvers) | traffic_of(matrix)
        return Selection(support, weights / weights.mean(), np.ones(len(support), dtype=np.int64), evidence)


def _interleaved(supports: list[list[int]]) -> list[int]:
    """The first of each, the second of each, …; repeated ones once."""
    longest = max(map(len, supports))
    return list(dict.fromkeys(s[rank] for rank in range(longest) for s in supports if rank < len(s)))


def _evidence_of(solvers: list[Any]) -> dict[str, Any]:
    return {
        "passes": sum(int(solver.n_iter_) for solver in solvers),
        "stop_reason": [reason for solver in solvers for reason in solver.stop_reason_],
        "group_residuals": [float(solver.residual_path_[-1]) for solver in solvers],
    }
