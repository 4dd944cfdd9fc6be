"""What a row loses: the floor's bound on the native weight that is not computed for it, and what calibration expects.

The twin here looks at ids, weights and the router's own numbers alone, in exact arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from harness import Trial, many_examples, trials
from hypothesis import given
from hypothesis import strategies as st
from policies_under_test import ROWS, Row
from test_by_hand import P_NE

from carpool import Batch, Outcome, Plan, RouteSpec, parse, route
from carpool.plans.counters import Counters
from carpool.plans.guards import Floor, Regret

every_policy = pytest.mark.parametrize("row", ROWS, ids=repr)
PARTS = ("", " | protect([0])", " | min_batch(2) | short_circuit", " | decode_only | protect([1, 3])", " | floor(0.9)")
ROUNDING = Fraction(1, 10**12)


def lost_weights(trial: Trial, outcome: Outcome) -> list[tuple[Fraction, dict[int, Fraction]]]:
    """Of every row its native weight, and the weight of each native expert that is not computed for it."""
    world, lost = trial.world(), []
    for row, (ids, weights) in enumerate(
        zip(outcome.routing.ids_NK.tolist(), outcome.routing.weights_NK.tolist(), strict=True)
    ):
        computed = {expert for expert, weight in zip(ids, weights, strict=True) if weight != 0}
        own = {expert: Fraction(world.native_weight(row, expert)) for expert in world.native[row]}
        lost.append((sum(own.values()), {expert: own[expert] for expert in own if expert not in computed}))
    return lost


@every_policy
@many_examples
@given(data=st.data(), tau=st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.7, 1.0]))
def test_the_floor_holds_whatever_the_batch(row: Row, data: st.DataObject, tau: float) -> None:
    trial = data.draw(trials(row, guards=PARTS))
    guards = list(trial.plan.guards)
    guards.insert(data.draw(st.integers(0, len(guards))), Floor(tau))
    trial = replace(trial, plan=Plan(trial.plan.policy, tuple(guards)))
    outcome = trial.run()
    for total, lost in lost_weights(trial, outcome):
        assert sum(lost.values()) <= (Fraction(tau) + ROUNDING) * total
    assert (outcome.displaced_N <= tau + 1e-12).all()
    if tau == 0 and outcome.routing.depth_NK is not None:
        needed_NK = outcome.routing.weights_NK != 0
        assert (outcome.routing.depth_NK >= trial.plan.prepare(trial.stats())["deepest"])[needed_NK].all()
    elif tau == 0:
        assert not outcome.changed_N.any()
    if tau == 1 and sum(isinstance(guard, Floor) for guard in guards) == 1:
        assert torch.equal(outcome.allowed_NE, outcome.unfloored_NE)
        assert not outcome.overflow_SE.any()


@every_policy
@many_examples
@given(data=st.data(), tau=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
def test_regret_bounds_the_routing_probability_that_a_row_loses(row: Row, data: st.DataObject, tau: float) -> None:
    trial = data.draw(trials(row, guards=(*PARTS[:-1], " | floor(0.5)")))
    trial = replace(trial, plan=Plan(trial.plan.policy, (Regret(tau), *trial.plan.guards)))
    outcome, world = trial.run(), trial.world()
    for index, ids in enumerate(outcome.routing.ids_NK.tolist()):
        chance = [Fraction(weight) for weight in world.weights[index]]
        lost = sum(chance[e] for e in world.native[index]) - sum(chance[e] for e in set(ids))
        assert lost <= (Fraction(tau) + ROUNDING) * sum(chance)
    if any(isinstance(guard, Floor) for guard in trial.plan.guards):
        assert (outcome.displaced_N <= 0.5 + 1e-12).all()
    elif tau == 1:
        assert torch.equal(outcome.allowed_NE, outcome.unfloored_NE)


def test_regret_by_hand() -> None:
    """One expert a row; most of the batch wants 0. The others' best and what they would lose: 1 by 0.05, 1 by 0.401."""
    p_NE = torch.tensor([[0.8, 0.1, 0.1], [0.9, 0.05, 0.05], [0.4, 0.45, 0.15], [0.299, 0.7, 0.001]])

    def chosen(guards: str) -> list[int]:
        plan = parse("xshare(1, warmup=0)" + guards)
        return route(plan, RouteSpec(top_k=1), p_NE.log(), Batch.of(4)).routing.ids_NK.flatten().tolist()

    assert chosen("") == [0, 0, 0, 0]
    assert chosen(" | regret(0.06)") == [0, 0, 0, 1]
    assert chosen(" | regret(0.04)") == [0, 0, 1, 1]
    assert chosen(" | regret(0.41)") == [0, 0, 0, 0]
    assert chosen(" | floor(0.99)") == [0, 0, 1, 1]
    plan = parse("xshare(1, warmup=0) | regret(0.2) | floor(0.5)")
    assert [guard.name for guard in plan.guards] == ["floor", "regret"]


@every_policy
@given(data=st.data())
def test_displaced_is_what_is_not_computed(row: Row, data: st.DataObject) -> None:
    trial = data.draw(trials(row))
    outcome = trial.run()
    expected = [float(sum(lost.values()) / total) if total else 0.0 for total, lost in lost_weights(trial, outcome)]
    assert outcome.displaced_N.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@every_policy
@given(data=st.data())
def test_what_calibration_expects_is_reported_apart(row: Row, data: st.DataObject) -> None:
    """Pairs left to a surrogate count by the energy that it left unexplained; all others in full."""
    trial = data.draw(trials(row))
    outcome, policy = trial.run(), trial.plan.policy
    left = trial.stats().get("surrogate_unexplained", torch.ones(trial.case.experts)).double().tolist()
    share = [Fraction(x) if policy.surrogates and x < 1 - policy.least else 1 for x in left]
    expected = []
    for total, lost in lost_weights(trial, outcome):
        expected.append(float(sum(w * share[e] for e, w in lost.items()) / total) if total else 0.0)
    assert outcome.expected_loss_N.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert (outcome.expected_loss_N <= outcome.displaced_N + 1e-12).all()
    if not policy.surrogates:
        assert torch.equal(outcome.expected_loss_N, outcome.displaced_N)


def test_a_surrogate_is_no_excuse() -> None:
    """Experts 0 and 1 are not read; a perfect surrogate stands in for both, and the floor still brings back the first.
    Native shares of the three rows: 0 4/7 and 1 3/7; 2 35/65 and 3 30/65; 0 0.6 and 5 0.4."""
    stats = {
        "surrogate_energy": torch.tensor([1.0, 1.0, 4.0, 4.0, 1.0, 1.0]),
        "surrogate_unexplained": torch.tensor([0.0, 0.25, 0.5, 0.5, 0.5, 0.5]),
    }

    def routed(text: str) -> Outcome:
        plan = parse(text)
        return route(plan, RouteSpec(top_k=2), P_NE.log(), Batch.of(3), stats=plan.policy.prepare(stats))

    bare = routed("surrogate(2)")
    assert bare.displaced_N.tolist() == pytest.approx([1.0, 0.0, 1.0])
    assert bare.expected_loss_N.tolist() == pytest.approx([0.25 * 3 / 7, 0.0, 0.5 * 0.4])
    floored = routed("surrogate(2) | floor(0.5)")
    assert floored.displaced_N.tolist() == pytest.approx([3 / 7, 0.0, 0.4])
    counters = Counters(["layer"])
    counters.add(0, floored.inputs.batch, floored)
    (report,) = counters.report()
    assert report.displaced_mass == pytest.approx(3 / 7 + 0.4)
    assert report.expected_loss == pytest.approx(0.25 * 3 / 7 + 0.5 * 0.4)
