"""Lynx by hand; see `test_by_hand` for the probabilities."""

from __future__ import annotations

import pytest
from test_by_hand import chosen, coreset, routed

from carpool import parse
from carpool.errors import CarpoolError


def test_popularity_counts_and_every_best_expert_stays() -> None:
    """Picks: expert 0 twice; 1, 2, 3 and 5 once. Best experts: 0, 2, 0. The third place goes by the tie rule to 1."""
    outcome = routed("lynx(3)")
    assert coreset(outcome) == {0, 1, 2}
    # 40:30 as it was, 35:10, 45:5
    assert chosen(outcome) == [{0: 0.5714, 1: 0.4286}, {2: 0.7778, 1: 0.2222}, {0: 0.9, 1: 0.1}]


def test_best_experts_may_exceed_the_budget() -> None:
    assert coreset(routed("lynx(1)")) == {0, 2}


@pytest.mark.parametrize("budget", ["0", "7", "1.5", "'4'"])
def test_impossible_budgets(budget: str) -> None:
    with pytest.raises(CarpoolError, match="budget"):
        parse(f"lynx({budget})").check(6, 2)
