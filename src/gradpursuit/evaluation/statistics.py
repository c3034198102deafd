"""Paired differences with bootstrap intervals, and the smallest effect that a design could have seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE, POWER = 0.95, 0.80
_RESAMPLES = 4999
_BATCH = 500  # of them at a time


@dataclass(frozen=True)
class Effect:
    """A mean of paired values.

    Attributes:
        mean: over all pairs.
        low, high: bounds of the 95 % bootstrap interval; NaN if there is nothing to resample.
        detectable: the smallest true mean that the design would have shown, with 80 % probability, to differ from
            zero at the 5 % level: (t₀.₉₇₅ + t₀.₈₀) standard errors, 2.80 where units and seeds are many.
        positive: pairs above zero.
        pairs: how many there are.
        ties: pairs at zero; None in what was kept by versions that did not count them.
    """

    mean: float
    low: float
    high: float
    detectable: float
    positive: int
    pairs: int
    ties: int | None = None


def effect(values: NDArray[np.float64], seed: int = 0) -> Effect:
    """The mean of paired values over units × seeds.

    Means of units (held-out rows, or targets) and means of seeds are resampled independently of one another, each with
    replacement, and what they deviate by adds up, so that the interval speaks of other rows *and* other seeds (as the
    pigeonhole bootstrap does; Owen, Annals of Applied Statistics 1, 2007; a little conservative: what differs by unit
    and seed together counts with both). What there is only one of is not resampled.

    Percentiles alone are too narrow where units or seeds are few (of three seeds they cannot leave the range, which
    holds the true mean in 75 % of all cases). Deviations of n means are scaled by √(n / (n - 1)), and the interval is
    stretched by t / z (Hesterberg, The American Statistician 69, 2015), with Welch's and Satterthwaite's degrees of
    freedom.

    Args:
        values: [units, seeds].
        seed: of the resampling.
    """
    mean, counts = float(values.mean()), (int((values > 0).sum()), values.size, int((values == 0).sum()))
    several = [values.mean(axis=axis) - mean for axis in (1, 0) if values.shape[1 - axis] > 1]
    if not several:
        return Effect(mean, np.nan, np.nan, np.nan, *counts)
    rng = np.random.default_rng(seed)
    deviations = np.sum([_resampled(means, rng) for means in several], axis=0)
    variances = np.array([means @ means / (len(means) - 1) / len(means) for means in several])
    freedom = np.array([len(means) - 1 for means in several])
    total = float(variances.sum())
    t = stats.t(total**2 / (variances**2 / freedom).sum()) if total > 0 else stats.norm()
    upper = float(t.ppf((1 + CONFIDENCE) / 2))
    ends = np.quantile(deviations, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = (mean + ends * upper / stats.norm.ppf((1 + CONFIDENCE) / 2)).tolist()
    return Effect(mean, low, high, (upper + float(t.ppf(POWER))) * total**0.5, *counts)


def _resampled(means: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of resamples of n deviations from their mean, with the variance that the mean of n has."""
    n = len(means)

    def drawn() -> Iterator[NDArray[np.float64]]:
        for start in range(0, _RESAMPLES, _BATCH):
            yield means[rng.integers(0, n, (min(_BATCH, _RESAMPLES - start), n))].mean(axis=1)

    return np.concatenate(list(drawn())) * (n / (n - 1)) ** 0.5
