"""Paired differences with bootstrap intervals, and the smallest effect that a design could have seen."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE, POWER = 0.95, 0.80
_RESAMPLES = 4999


@dataclass(frozen=True)
class Effect:
    """A mean of paired values.

    Attributes:
        mean: over all pairs.
        low, high: bounds of the 95 % bootstrap interval; NaN if there is nothing to resample.
        detectable: the smallest true mean that the design would have shown, with 80 % probability, to differ from
            zero at the 5 % level: (z₀.₉₇₅ + z₀.₈₀) × bootstrap standard error, 2.80 standard errors. The standard error
            is itself an estimate: with few units the true figure may be larger.
        positive: pairs above zero.
        pairs: how many there are.
    """

    mean: float
    low: float
    high: float
    detectable: float
    positive: int
    pairs: int


def effect(values: NDArray[np.float64], seed: int = 0) -> Effect:
    """The mean of paired values over units × seeds.

    Units (held-out rows, or targets) and seeds are resampled independently of one another, each with replacement, so
    that the interval speaks of other rows *and* other seeds (the pigeonhole bootstrap; Owen, Annals of Applied
    Statistics 1, 2007; conservative). What there is only one of is not resampled. Percentile interval.

    Args:
        values: [units, seeds].
        seed: of the resampling.
    """
    units, seeds = values.shape
    mean, positive = float(values.mean()), int((values > 0).sum())
    samples = [np.arange(n) for n in (units, seeds) if n > 1]
    if not samples:
        return Effect(mean, np.nan, np.nan, np.nan, positive, values.size)

    def statistic(*drawn: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        rest = list(drawn)
        rows = rest.pop(0) if units > 1 else np.zeros((*drawn[0].shape[:-1], 1), dtype=np.int64)
        columns = rest.pop(0) if seeds > 1 else np.zeros((*drawn[0].shape[:-1], 1), dtype=np.int64)
        means: NDArray[np.float64] = values[rows[..., :, None], columns[..., None, :]].mean(axis=(-2, -1))
        return means

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # equal values: an interval of width zero
        found = stats.bootstrap(
            samples,
            statistic,
            n_resamples=_RESAMPLES,
            batch=500,
            confidence_level=CONFIDENCE,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(seed),
        )
    interval = found.confidence_interval
    detectable = (stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)) * found.standard_error
    return Effect(mean, float(interval.low), float(interval.high), float(detectable), positive, values.size)
