"""Intervals against a slow twin, and what they must hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool.evaluate.intervals import Estimate, estimate, interval, ratio, ratio_draws, resample

values = st.lists(st.tuples(st.floats(0, 10), st.floats(0.5, 10)), min_size=2, max_size=6)


@given(values, st.integers(0, 100))
def test_draws_equal_a_loop_over_drawn_batches(pairs, seed):
    numerator_M, denominator_M = map(np.array, zip(*pairs, strict=True))
    counts_RM = resample(len(pairs), seed, draws=20)
    slow = []
    for counts in counts_RM:
        drawn = [batch for batch, count in enumerate(counts) for _ in range(int(count))]
        assert len(drawn) == len(pairs)
        slow.append(sum(numerator_M[b] for b in drawn) / sum(denominator_M[b] for b in drawn))
    assert ratio_draws(numerator_M, denominator_M, counts_RM) == pytest.approx(np.array(slow))
    ordered = sorted(slow)
    low, high = interval(np.array(slow), level=0.9)
    # linear between order statistics: 5 % of 19 gaps from either end
    assert low == pytest.approx(ordered[0] + 0.95 * (ordered[1] - ordered[0]))
    assert high == pytest.approx(ordered[-1] - 0.95 * (ordered[-1] - ordered[-2]))


def test_resample_is_seeded_and_even():
    assert np.array_equal(resample(4, 1), resample(4, 1))
    assert not np.array_equal(resample(4, 1), resample(4, 2))
    assert resample(5, 0).mean(0) == pytest.approx(np.ones(5), abs=0.1)


def test_covers_the_truth_about_as_often_as_it_says():
    """95 % intervals of a mean over 30 batches, 300 times: between 88 and 99 % hold the true mean."""
    rng = np.random.default_rng(0)
    ones, counts_RM = np.ones(30), resample(30, 0, draws=500)
    held = 0
    for _ in range(300):
        found = estimate(rng.normal(2.0, 1.0, size=30), ones, counts_RM)
        held += found.low <= 2.0 <= found.high
    assert 0.88 <= held / 300 <= 0.99


def test_pairing_cancels_what_batches_share():
    """A constant difference between policies has no spread, however much batches differ."""
    base_M = np.array([1.0, 5.0, 9.0, 2.0])
    found = estimate((base_M + 0.5) - base_M, np.ones(4), resample(4, 0), exponential=True)
    assert found.value == pytest.approx(np.exp(0.5))
    assert found.low == pytest.approx(found.high) == pytest.approx(found.value)


def test_one_batch_has_no_interval():
    assert estimate(np.array([3.0]), np.array([2.0]), resample(1, 0)) == Estimate(1.5)


def test_empty_denominators():
    """A domain may be missing from every batch, or from those of a draw."""
    assert np.isnan(ratio(np.zeros(2), np.zeros(2)))
    assert interval(np.full(3, np.nan)) == (None, None)
    low, high = interval(ratio_draws(np.array([4.0, 0.0]), np.array([2.0, 0.0]), resample(2, 0)))
    assert (low, high) == (2.0, 2.0)
