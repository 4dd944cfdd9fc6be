"""The threshold search against trying everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from carpool.calibrate.thresholds import threshold_for
from carpool.errors import CarpoolError

values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


@given(heights=values, target=st.floats(0, 1), rising=st.booleans())
def test_one_threshold(heights: list[float], target: float, rising: bool) -> None:
    heights = sorted(heights)
    if rising is False and len(heights) > 2:
        heights[0], heights[-1] = heights[-1], heights[-1]  # not monotone
    grid = list(range(len(heights)))
    reaching = [place for place in grid if heights[place] >= target]
    if heights[-1] < target:
        with pytest.raises(CarpoolError, match="widen"):
            threshold_for(lambda tau: heights[int(tau)], target, grid)
        return
    found = threshold_for(lambda tau: heights[int(tau)], target, grid)
    assert found in reaching
    if rising:
        assert found == reaching[0]


def test_what_is_not_monotone_is_tried_one_by_one() -> None:
    heights = [0.1, 0.5, 0.2, 0.1, 0.3, 0.6, 0.5]  # bisection alone would end at 5
    assert threshold_for(lambda tau: heights[int(tau)], 0.45, list(range(7))) == 1


def test_bisection_needs_few_passes() -> None:
    calls: list[float] = []

    def skipped(tau: float) -> float:
        calls.append(tau)
        return tau / 100

    assert threshold_for(skipped, 0.37, list(range(101))) == 37
    assert len(calls) <= 8


def test_impossible_arguments() -> None:
    with pytest.raises(CarpoolError, match="share"):
        threshold_for(lambda tau: 1.0, 1.5, [0.0])
    with pytest.raises(CarpoolError, match="ascending"):
        threshold_for(lambda tau: 1.0, 0.5, [1.0, 0.0])
    with pytest.raises(CarpoolError, match="ascending"):
        threshold_for(lambda tau: 1.0, 0.5, [])
