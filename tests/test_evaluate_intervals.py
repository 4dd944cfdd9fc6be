"""Intervals against slow twins and textbook formulas, and how often they hold the truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool.evaluate.intervals import (
    FEWEST,
    LEAST_KL,
    Estimate,
    estimate,
    interval,
    kept,
    log_kl,
    ratio,
    ratios,
    student_quantile,
)

values = st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.5, 10)), min_size=FEWEST, max_size=16)


def textbook(sample: np.ndarray) -> tuple[float, float]:
    """The t interval of a mean."""
    stats = pytest.importorskip("scipy.stats")
    half = stats.t.ppf(0.975, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


@given(values)
def test_samples_leave_one_batch_out(pairs):
    numerator_M, denominator_M = map(np.array, zip(*pairs, strict=True))
    slow = [numerator_M.sum() / denominator_M.sum()]
    for batch in range(len(pairs)):
        rest = [place for place in range(len(pairs)) if place != batch]
        slow.append(sum(numerator_M[b] for b in rest) / sum(denominator_M[b] for b in rest))
    assert ratios(numerator_M, denominator_M) == pytest.approx(np.array(slow))
    assert log_kl(numerator_M, denominator_M) == pytest.approx(np.log(slow))
    assert kept(len(pairs)).shape == (1 + len(pairs), len(pairs))


@given(values, st.floats(0.5, 20))
def test_of_a_mean_it_is_the_textbooks(pairs, size):
    sample = np.array([value for value, _ in pairs])
    found = estimate(sample * size, np.full(len(sample), size))
    assert found.value == pytest.approx(sample.mean())
    assert (found.low, found.high) == pytest.approx(textbook(sample), abs=1e-4)


@given(values)
def test_of_a_ratio_it_is_near_the_delta_method(pairs):
    """Residuals of the ratio over the mean denominator; the jackknife is a little wider."""
    numerator_M, denominator_M = map(np.array, zip(*pairs, strict=True))
    value = ratio(numerator_M, denominator_M)
    low, high = textbook((numerator_M - value * denominator_M) / denominator_M.mean())
    found = estimate(numerator_M, denominator_M)
    assert found.high - found.low == pytest.approx(high - low, rel=0.6, abs=1e-6)
    assert (found.low + found.high) / 2 == pytest.approx(value)


def test_scales():
    """Symmetric on the scale that was asked for, and never beyond what a share can be."""
    sums_M, ones = np.array([1.0, 1.3, 0.8, 1.1, 0.9, 1.2, 1.0, 0.7, 1.4, 1.6]), np.ones(10)
    linear, log, exp = (estimate(sums_M, ones, scale) for scale in ("linear", "log", "exp"))
    assert (linear.low + linear.high) / 2 == pytest.approx(linear.value)
    assert log.value == linear.value
    assert log.low * log.high == pytest.approx(log.value**2)
    assert (exp.value, exp.low, exp.high) == pytest.approx(tuple(np.exp([linear.value, linear.low, linear.high])))
    shares_M = np.array([1.0] * 9 + [0.5])
    assert estimate(shares_M, ones).high > 1
    assert estimate(shares_M, ones, "share").high == 1.0
    assert estimate(1 - shares_M, ones, "share").low == 0.0


@pytest.mark.parametrize("freedom", [9, 11, 15, 23, 47, 1000])
def test_quantiles_of_student(freedom):
    stats = pytest.importorskip("scipy.stats")
    for probability, error in ((0.95, 2e-5), (0.975, 2e-5), (0.995, 2e-4)):
        error *= (9 / freedom) ** 4  # what is left of the expansion falls faster still
        assert student_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), abs=error)


@pytest.mark.parametrize("batches", [FEWEST, 24])
@pytest.mark.parametrize("scatter", ["normal", "lognormal"])
def test_holds_the_truth_as_often_as_it_says(batches, scatter):
    """The KL at the scatter that batches show; `benchmarks/interval_coverage.py` has every cell."""
    rng, ones = np.random.default_rng(batches), np.ones(batches)
    held = 0
    for _ in range(2000):
        sample = rng.normal(1, 0.2, batches) if scatter == "normal" else rng.lognormal(-(0.25**2) / 2, 0.25, batches)
        found = estimate(sample, ones, "log")
        held += found.low <= 1 <= found.high
    assert 0.93 <= held / 2000 <= 0.97


def test_pairing_cancels_what_batches_share():
    """A constant difference between policies has no spread, however much batches differ."""
    base_M = np.arange(12.0) ** 2
    found = estimate((base_M + 0.5) - base_M, np.ones(12), "exp")
    assert found.value == pytest.approx(np.exp(0.5))
    assert found.low == pytest.approx(found.high) == pytest.approx(found.value)


@pytest.mark.parametrize("scale", ["linear", "share", "log", "exp"])
def test_few_batches_have_no_interval(scale):
    ones = np.ones(FEWEST)
    found = estimate(ones[1:] / 2, ones[1:], scale)
    assert (found.low, found.high) == (None, None)
    assert estimate(ones / 2, ones, scale).low is not None
    assert interval(np.ones(FEWEST)) == (None, None)  # all, and nine without one
    assert estimate(np.array([3.0]), np.array([2.0])) == Estimate(1.5)


def test_kl_of_stock_is_nought_and_says_so():
    ones = np.ones(12)
    assert estimate(0 * ones, ones, "log") == Estimate(0.0, 0.0, 0.0)
    assert log_kl(0 * ones, ones) == pytest.approx(np.full(13, np.log(LEAST_KL)))


def test_batches_without_the_domain_do_not_count():
    """A domain may be missing from every batch, or from all but a few."""
    assert np.isnan(ratio(np.zeros(2), np.zeros(2)))
    some_M = np.array([1.0] * 9 + [0.0] * 20)
    assert estimate(some_M * 2, some_M) == Estimate(2.0)
    more_M = np.array([1.0] * 11 + [0.0] * 20)
    assert estimate(more_M * 2, more_M) == Estimate(2.0, 2.0, 2.0)
    assert np.isnan(estimate(np.zeros(12), np.zeros(12)).value)
