"""BASE: by hand, against its twin where energies are not too close, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import more_twins
import pytest
import torch
import twins
from harness import trials
from hypothesis import given
from hypothesis import strategies as st
from policies_under_test import ROWS
from test_by_hand import P_NE, coreset

from carpool import Batch, Outcome, RouteSpec, parse, route
from carpool.errors import CarpoolError

# output norms 1, 2, 1, 3, 1, 1; expert 5's grows with the only hidden number
STATS = {
    "norm_weight": torch.tensor([[0.0], [0.0], [0.0], [0.0], [0.0], [1.0]]),
    "norm_bias": torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 1.0]).log(),
    "norm_scale": torch.tensor(0.0),
}


def routed(text: str, hidden: list[float]) -> Outcome:
    plan = parse(text)
    hidden_NH = torch.tensor(hidden).unsqueeze(-1)
    stats = plan.policy.prepare(STATS)
    return route(plan, RouteSpec(top_k=2), P_NE.log(), Batch.of(3), stats=stats, hidden_NH=hidden_NH)


def test_energy_decides() -> None:
    """0: .16 + .2025 = .3625, 1: .09 * 4 = .36, 2: .1225, 3: .09 * 9 = .81, 5: .09 (times exp(2 x) of row 2)."""
    assert coreset(routed("base(2)", [0.0, 0.0, 0.0])) == {0, 3}
    assert coreset(routed("base(3)", [0.0, 0.0, 0.0])) == {0, 1, 3}
    assert coreset(routed("base(2)", [0.0, 0.0, math.log(3.5)])) == {3, 5}  # .09 * 12.25 = 1.1025
    assert coreset(routed("base(2)", [9.0, 9.0, 0.0])) == {0, 3}  # rows that do not pick expert 5 say nothing of it


def test_an_outlier_does_not_break_the_sums() -> None:
    """A prediction beyond all floats counts as the most there is."""
    assert coreset(routed("base(1)", [0.0, 0.0, 1e4])) == {5}
    assert coreset(routed("base(2)", [1e4, 1e4, 0.0])) == {0, 3}
    # nor for rows that do not pick the expert: 0 times it is 0, and row 2 is heard
    assert coreset(routed("base(2)", [1e4, 0.0, math.log(3.5)])) == {3, 5}


def test_without_the_routers_input() -> None:
    plan = parse("base(2)")
    stats = plan.policy.prepare(STATS)
    with pytest.raises(CarpoolError, match="router's input"):
        route(plan, RouteSpec(top_k=2), P_NE.log(), Batch.of(3), stats=stats)


@pytest.mark.parametrize("name", ["norm_weight", "norm_bias", "norm_scale"])
def test_statistics_of_the_wrong_shape(name: str) -> None:
    with pytest.raises(CarpoolError, match="predictor"):
        parse("base(2)").policy.prepare(STATS | {name: torch.zeros(2, 2, 2)})


@given(data=st.data())
def test_twin(data: st.DataObject) -> None:
    """Two ways to compute an energy round differently, so an expert may differ only where energies nearly tie."""
    row = replace(next(row for row in ROWS if row.name == "base"), twin=more_twins.BASE)
    trial = data.draw(trials(row, groups=False, guards=("",)))
    outcome, policy = trial.run(), trial.plan.policy
    world = trial.world()
    slow = twins.run(world, more_twins.BASE, policy)
    for group, expected in enumerate(slow.coresets):
        found = set(outcome.coreset_GE[group].nonzero().flatten().tolist())
        assert len(found) == len(expected)
        cost = more_twins.base_cost(world, group)
        swapped = [cost[expert] for expert in found ^ expected]
        assert not swapped or max(swapped) - min(swapped) <= 8 + 1e-4 * max(swapped)
