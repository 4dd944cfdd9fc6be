"""Intervals: a paired bootstrap over whole batches.

The tokens of a batch share their experts and the tokens of a sequence their context, so neither is independent;
batches are. All policies are measured on the same batches and resampled by the same draws, so that differences
between them are paired.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
FEWEST = 4  # batches; resampling fewer says nothing

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95 % interval (None where there are too few batches for one)."""

    value: float
    low: float | None = None
    high: float | None = None


def resample(batches: int, seed: int, draws: int = DRAWS) -> Array:
    """How often each draw holds each batch, `[R, M]`; every row sums to `M`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(batches, np.full(batches, 1 / batches), size=draws).astype(np.float64)


def ratio(numerator_M: Array, denominator_M: Array) -> float:
    """Ratio of the sums over all batches; NaN if the denominator is empty."""
    total = denominator_M.sum()
    return float(numerator_M.sum() / total) if total else float("nan")


def ratio_draws(numerator_M: Array, denominator_M: Array, counts_RM: Array) -> Array:
    """The ratio of the sums in every draw, `[R]`; NaN where the denominator is empty."""
    below_R = counts_RM @ denominator_M
    return np.divide(counts_RM @ numerator_M, below_R, out=np.full(len(counts_RM), np.nan), where=below_R != 0)


def interval(draws_R: Array, level: float = LEVEL) -> tuple[float | None, float | None]:
    """Percentiles that hold `level` of the draws; None, None if no draw has a value."""
    draws_R = draws_R[~np.isnan(draws_R)]
    if not len(draws_R):
        return None, None
    tail = (1 - level) / 2
    low, high = np.quantile(draws_R, [tail, 1 - tail])
    return float(low), float(high)


def estimate(numerator_M: Array, denominator_M: Array, counts_RM: Array, *, exponential: bool = False) -> Estimate:
    """A ratio of sums (or e to the power of it) with its interval; none with fewer than `FEWEST` batches."""
    value, draws_R = ratio(numerator_M, denominator_M), ratio_draws(numerator_M, denominator_M, counts_RM)
    if exponential:
        value, draws_R = float(np.exp(value)), np.exp(draws_R)
    if len(numerator_M) < FEWEST:
        return Estimate(value)
    return Estimate(value, *interval(draws_R))
