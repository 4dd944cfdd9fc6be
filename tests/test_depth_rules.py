"""Published rules of how deep experts are read: HOBBIT by pair, MC's plan against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import many_examples, trials
from hypothesis import given
from hypothesis import strategies as st
from layer_statistics import planes
from policies_under_test import ROWS

from carpool import CarpoolError, parse
from carpool.policies.bit_plan import cheapest

HOBBIT = next(row for row in ROWS if row.name == "hobbit")
CLOSE = 1e-9


@many_examples
@given(data=st.data())
def test_hobbit_reads_as_deep_as_the_pair_that_asks_for_most(data: st.DataObject) -> None:
    trial = data.draw(trials(HOBBIT, guards=("",)))
    outcome = trial.run()
    inputs, policy = outcome.inputs, trial.plan.policy
    found_GE = policy.read_depth(inputs)
    assert found_GE is not None
    for group in range(inputs.batch.num_groups):
        least, most = {}, {}
        for row in (inputs.batch.voter_N & (inputs.batch.group_N == group)).nonzero().flatten().tolist():
            weights = dict(zip(inputs.native_ids_NK[row].tolist(), inputs.native_weight_NK[row].tolist(), strict=True))
            total = sum(weights.values())
            for expert, weight in weights.items():
                heavier = sum(other for other in weights.values() if other > weight) / total
                for kept, score in ((least, heavier + CLOSE), (most, heavier - CLOSE)):
                    bits = policy.high if score <= policy.first else policy.low if score <= policy.second else 0
                    kept[expert] = max(kept.get(expert, 0), bits)
        rest = policy.low if policy.second >= 1 else 0
        for expert in range(trial.case.experts):
            assert least.get(expert, rest) <= int(found_GE[group, expert]) <= most.get(expert, rest)


@given(
    experts=st.integers(1, 5), levels=st.sampled_from([[1, 2, 3], [2, 3, 4], [2, 4], [0, 3]]),
    mean=st.sampled_from([1.0, 2.0, 2.5, 3.4, 4.0]), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_bit_plan_is_the_best_of_all(experts: int, levels: list[int], mean: float, seed: int) -> None:
    drawn_EJ = torch.rand(experts, len(levels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cost_EJ = drawn_EJ.tolist()
    bits = max(int(mean * experts), levels[0] * experts)
    needed = [level for level in (2, 3) if {2, 3} <= set(levels)]
    fits = [plan for plan in itertools.product(levels, repeat=experts) if sum(plan) <= bits]
    met = [plan for plan in fits if set(needed) <= set(plan)]
    best = min(
        sum(cost[levels.index(level)] for cost, level in zip(cost_EJ, plan, strict=True)) for plan in (met or fits)
    )
    found = cheapest(drawn_EJ, levels, bits, needed)
    assert sum(found) <= bits
    assert sum(cost[levels.index(level)] for cost, level in zip(cost_EJ, found, strict=True)) == pytest.approx(best)


def test_a_plan_spends_its_bits_where_they_are_worth_most() -> None:
    stats = planes(6, torch.Generator().manual_seed(0))
    stats["depth_energy"] = torch.tensor([100.0, 1, 1, 1, 1, 0.01])
    stats["depth_error"] = torch.tensor([0.1, 0.03, 0.008]).unsqueeze(-1).expand(3, 6)
    stats["depth_use"] = torch.ones(1, 1, 6)
    bits = parse("bit_plan(3, alpha=0, beta=0)").prepare(stats)["bits"].tolist()
    assert bits[0] == max(bits) == 4
    assert bits[-1] == min(bits) == 2
    assert sum(bits) <= 18


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hobbit(2, 4)", "high the more"),
        ("hobbit(4, 2, first=0.9, second=0.5)", "in this order"),
        ("bit_plan(0)", "up to 8"),
        ("bit_plan(3, levels=[3, 2])", "ascending"),
    ],
)
def test_bad_parameters(text: str, said: str) -> None:
    with pytest.raises(CarpoolError, match=said):
        parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [("hobbit(8, 2)", "not at 8"), ("bit_plan(1)", "ask for more"), ("bit_plan(3, levels=[2, 7])", "is not stored")],
)
def test_what_the_file_does_not_hold(text: str, said: str) -> None:
    with pytest.raises(CarpoolError, match=said):
        parse(text).prepare(planes(6, torch.Generator().manual_seed(0)))


def test_a_plan_of_summed_importance() -> None:
    """MC#: of two experts that lose alike, the one that weighs more in `alpha f + beta w` gets the bits; a product is 0
    for an expert that nobody picked."""
    stats = planes(4, torch.Generator().manual_seed(0))
    stats["depth_energy"], stats["depth_use"] = torch.ones(4), torch.ones(1, 1, 4)
    stats["depth_error"] = torch.tensor([0.1, 0.03, 0.008]).unsqueeze(-1).expand(3, 4)
    stats["coverage"], stats["depth_gate"] = torch.tensor([0, 30, 35, 35]), torch.tensor([0.7, 0.1, 0.1, 0.1])
    product, sums = (parse(f"bit_plan(bits=2.5{more})").prepare(stats)["bits"] for more in ("", ", importance='sum'"))
    assert product.tolist()[0] == 2
    assert sums.tolist()[0] == max(sums.tolist()) > 2
    with pytest.raises(CarpoolError, match="importance='mean'"):
        parse("bit_plan(bits=2.5, importance='mean')")
