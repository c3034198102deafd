"""Gain of held-out loss against budget, with intervals."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gradpursuit.evaluation.compare import FULL
from gradpursuit.evaluation.findings import Findings
from gradpursuit.files import write_atomic

logger = logging.getLogger("gradpursuit")


def plot_gains(path: Path, findings: Findings) -> bool:
    """Draw `path` (PNG): one panel per protocol, one line per strategy; False if there is nothing or no matplotlib."""
    gains = findings.gains()
    protocols = list(dict.fromkeys(protocol for _, _, protocol in gains))
    if not protocols:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("no plot of the gains: matplotlib is not installed; pip install 'gradpursuit[eval]'")
        return False
    figure = Figure(figsize=(6.4 * len(protocols), 4.8), layout="constrained")
    drawn: dict[str, Any] = {}
    for axes, protocol in zip(figure.subplots(1, len(protocols), squeeze=False)[0], protocols, strict=True):
        strategies = list(dict.fromkeys(name for name, budget, of in gains if of == protocol and budget))
        for place, name in enumerate(strategies):
            points = sorted((budget, e) for (n, budget, of), e in gains.items() if n == name and of == protocol)
            budgets = [budget * 1.015 ** (place - len(strategies) / 2) for budget, _ in points]  # side by side
            means = [e.mean for _, e in points]
            around = [[e.mean - e.low for _, e in points], [e.high - e.mean for _, e in points]]
            drawn[name] = axes.errorbar(budgets, means, yerr=around, marker="o", capsize=3)
        full = gains.get((FULL, 0, protocol))
        if full:
            drawn["full pool"] = axes.axhline(full.mean, linestyle="--", color="gray")
        axes.set(
            xscale="log", xlabel="examples chosen", ylabel="gain of held-out loss (nats per token)", title=protocol
        )
        ticks = sorted({budget for _, budget, of in gains if budget and of == protocol})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        if ticks:
            axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)  # of a single budget too
        axes.minorticks_off()
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=4)  # beside the data
    with write_atomic(path) as file:
        figure.savefig(file, format="png", dpi=150)
    return True
