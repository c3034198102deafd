"""What the comparison found, for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradpursuit.report.absent import require

if TYPE_CHECKING:
    from gradpursuit.pipeline import Run


def comparison(run: Run) -> dict[str, Any]:
    """Held-out loss of every strategy: before, after with every seed, mean, and the range of the seeds.

    Raises:
        AbsentError: nothing was compared yet, or for other selections.
    """
    require(run, "evaluation")
    lines = run.lines()
    return {
        "metric": "held-out loss, nats per supervised token",
        "interval": "range of the seeds",
        "seeds": max(len(line.losses) for line in lines),
        "before": lines[0].before,
        "rows": [
            {
                "strategy": line.strategy,
                "examples": line.examples,
                "copies": line.copies,
                "layers": line.layers,
                "losses": line.losses,
                "mean": line.after,
                "low": min(line.losses),
                "high": max(line.losses),
            }
            for line in lines
        ],
    }
