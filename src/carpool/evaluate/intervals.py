"""Intervals: Student's t over independent batches, with the spread of the delete-one jackknife.

The tokens of a batch share their experts and those of a document their subject, so neither is independent; batches are,
which share no document. A statistic of the sums over all batches (a ratio, its logarithm, one method's KL over
another's at equal bytes) is computed once from all of them and once without each; how much the latter differ says how
uncertain the former is (Efron and Stein, The jackknife estimate of variance, 1981). All plans are measured on the same
batches, so differences between them are paired. `benchmarks/interval_coverage.py` simulates how often the truth lies
inside.

Shapes: `M` batches; `K = 1 + M` samples: all batches, then all but the first, all but the second and so on.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
FEWEST = 10  # batches; with fewer the interval would be wide and its coverage would hang on the shape of the scatter
LEAST_KL = 1e-9  # nats; below what float32 resolves, keeps log KL finite
METHOD = "Student's t over independent batches, delete-one jackknife"

Array = NDArray[np.float64]
Scale = Literal["linear", "share", "log", "exp"]


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95 % interval (None where there are too few batches for one)."""

    value: float
    low: float | None = None
    high: float | None = None


def kept(batches: int) -> Array:
    """Which batches each sample holds, `[K, M]`."""
    return np.vstack([np.ones((1, batches)), 1 - np.eye(batches)])


def ratio(numerator_M: Array, denominator_M: Array) -> float:
    """Ratio of the sums over all batches; NaN if the denominator is empty."""
    total = denominator_M.sum()
    return float(numerator_M.sum() / total) if total else float("nan")


def ratios(numerator_M: Array, denominator_M: Array) -> Array:
    """The ratio of the sums in every sample, `[K]`; NaN where the denominator is empty."""
    kept_KM = kept(len(numerator_M))
    below_K = kept_KM @ denominator_M
    return np.divide(kept_KM @ numerator_M, below_K, out=np.full(len(kept_KM), np.nan), where=below_K != 0)


def log_kl(kl_M: Array, tokens_M: Array) -> Array:
    """Logarithm of the mean KL in every sample, `[K]`."""
    return np.log(np.maximum(ratios(kl_M, tokens_M), LEAST_KL))


def interval(statistic_K: Array, level: float = LEVEL) -> tuple[float, float] | tuple[None, None]:
    """The interval of a statistic from its values in all samples; None, None with fewer than `FEWEST` batches."""
    value, without_M = float(statistic_K[0]), statistic_K[1:]
    batches = len(without_M)
    if batches < FEWEST or not np.isfinite(statistic_K).all():
        return None, None
    error = np.sqrt((batches - 1) / batches * np.square(without_M - without_M.mean()).sum())
    half = student_quantile((1 + level) / 2, batches - 1) * float(error)
    return value - half, value + half


def estimate(numerator_M: Array, denominator_M: Array, scale: Scale = "linear") -> Estimate:
    """A ratio of sums with its interval; batches in which the denominator is empty do not count.

    Args:
        scale: where the interval is symmetric. `linear`: on the ratio; `share`: the same within 0 and 1; `log`: on its
            logarithm, for what is positive and small (KL); `exp`: e to the power of the ratio is the value
            (perplexities and their ratios).
    """
    counted_M = denominator_M != 0
    numerator_M, denominator_M = numerator_M[counted_M], denominator_M[counted_M]
    value = ratio(numerator_M, denominator_M)
    if scale == "log" and value == 0:
        return Estimate(value, *((value, value) if len(numerator_M) >= FEWEST else ()))
    samples_K = log_kl(numerator_M, denominator_M) if scale == "log" else ratios(numerator_M, denominator_M)
    low, high = interval(samples_K)
    value = float(np.exp(value)) if scale == "exp" else value
    if low is None or high is None:
        return Estimate(value)
    if scale in ("log", "exp"):
        low, high = float(np.exp(low)), float(np.exp(high))
    elif scale == "share":
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(value, low, high)


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t with 9 degrees of freedom or more, to 1e-4 (Abramowitz and Stegun 26.7.5)."""
    z, n = NormalDist().inv_cdf(probability), freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )
