"""`omp`: non-negative orthogonal matching pursuit on the same problem, one example at a time."""

from __future__ import annotations

from gradpursuit.config import GradientsSection
from gradpursuit.gradients.preconditioner import Preconditioner
from gradpursuit.pursuit import NonNegativeOMP
from gradpursuit.selection.base import Selection, SelectionProblem
from gradpursuit.selection.gtp import from_solver, pursuit_evidence


class OMP:
    """Greedy: each step adds the example that correlates most with what is left, then refits all weights."""

    name = "omp"
    source = "Bruckstein, Elad, Zibulevsky, 2008 (non-negative OMP)"
    stochastic = False

    def needs(self, gradients: GradientsSection) -> list[Preconditioner]:
        """The configured preconditioner."""
        return [Preconditioner(gradients.preconditioner)]

    def select(self, problem: SelectionProblem, k: int, seed: int) -> Selection:
        """At most `k` examples; fewer when no further one correlates with the residual.

        Raises:
            SelectionError: no pool example correlates with the target.
        """
        matrix, target = problem.matching()
        solver = NonNegativeOMP(k, alpha=problem.pursuit.alpha).fit(matrix, target)
        return from_solver(solver, pursuit_evidence(solver, matrix))
