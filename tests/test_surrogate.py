"""Surrogates: the policy by hand and against its twin where costs are not too close, and what stands in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import twins
from harness import Trial, trials
from hypothesis import given
from hypothesis import strategies as st
from policies_under_test import ROWS
from test_by_hand import P_NE, coreset

from carpool import Batch, Outcome, RouteSpec, parse, route
from carpool.errors import CarpoolError
from carpool.experts.surrogates import Surrogates

ROW = next(row for row in ROWS if row.name == "surrogate")
# expert 0 is foreseen perfectly, expert 4 not at all
STATS = {
    "surrogate_energy": torch.tensor([9.0, 1.0, 1.0, 4.0, 1.0, 1.0]),
    "surrogate_unexplained": torch.tensor([0.0, 0.5, 0.5, 0.25, 1.0, 0.5]),
}


def routed(text: str) -> Outcome:
    plan = parse(text)
    return route(plan, RouteSpec(top_k=2), P_NE.log(), Batch.of(3), stats=plan.policy.prepare(STATS))


def test_what_is_foreseen_need_not_be_read() -> None:
    """Shares of the native pairs: 0 .571 and 1 .429, 2 .538 and 3 .462, 0 .6 and 5 .4. Times energy and loss, over 9:
    0: 0, 1: .184 * .5, 2: .290 * .5, 3: .213 * 4 * .25, 5: .16 * .5."""
    assert coreset(routed("surrogate(2, warmup=0)")) == {2, 3}
    assert coreset(routed("surrogate(3, warmup=0)")) == {1, 2, 3}
    assert coreset(routed("surrogate(1, warmup=0, select='energy')")) == {0}
    assert coreset(routed("surrogate(1, warmup=0, select='squared')")) == {0}


def test_displaced_pairs_keep_the_weight_that_the_router_gave() -> None:
    outcome = routed("surrogate(2, warmup=0)")
    native = RouteSpec(top_k=2).native(P_NE.log())
    routing, moved = outcome.routing, torch.tensor([0, 2])
    assert routing.surrogate_ids_NK is not None
    assert routing.surrogate_weights_NK is not None
    assert torch.equal(routing.surrogate_ids_NK[moved].int(), native.ids_NK[moved])
    assert torch.equal(routing.surrogate_weights_NK[moved], native.weights_NK[moved])
    assert not routing.weights_NK[moved].any()
    assert routing.ids_NK[moved].tolist() == [[2, 2], [3, 3]], "rows without an expert read their best of the coreset"
    assert torch.equal(routing.weights_NK[1], native.weights_NK[1])
    assert not routing.surrogate_weights_NK[1].any()
    assert outcome.surrogates_SE.nonzero()[:, 1].tolist() == [0, 1, 5]
    assert outcome.displaced_N.tolist() == pytest.approx([1.0, 0.0, 1.0]), "a surrogate computes no expert"
    lost = [0.5 * float(native.weights_NK[0, 1]), 0.0, 0.5 * float(native.weights_NK[2, 1])]
    assert outcome.expected_loss_N.tolist() == pytest.approx(lost)


def test_an_expert_without_a_good_surrogate_is_filled_up_from_the_coreset() -> None:
    outcome = routed("surrogate(2, warmup=0, least=0.6)")  # 0 and 3 have good ones
    left = outcome.routing.surrogate_weights_NK != 0
    assert set(outcome.routing.surrogate_ids_NK[left].tolist()) <= {0, 3}
    assert (
        outcome.routing.weights_NK.sum(-1) + outcome.routing.surrogate_weights_NK.sum(-1)
    ).tolist() == pytest.approx([1.0] * 3)
    bare = routed("surrogate(2, warmup=0, least=2)")
    assert bare.routing.surrogate_ids_NK is None
    assert not bare.surrogates_SE.any()


@pytest.mark.parametrize("text", ["surrogate(2, least=-1)", "surrogate(2, select='best')", "surrogate(2, least='x')"])
def test_bad_parameters(text: str) -> None:
    with pytest.raises(CarpoolError, match=r"least=|select="):
        parse(text)


def test_statistics_of_the_wrong_shape() -> None:
    with pytest.raises(CarpoolError, match="unexplained shares"):
        parse("surrogate(2)").policy.prepare(STATS | {"surrogate_energy": torch.ones(3)})


def costs(world: twins.World, group: int, policy: Any) -> list[float]:
    """sum of (w / row's native weight)^2 * energy * unexplained."""
    energy, left = world.stats["surrogate_energy"], world.stats["surrogate_unexplained"]
    used = [share < (1 - policy.least if policy.least > 0 else 1) for share in left]
    cost = [0.0] * world.num_experts
    for row in world.voters(group):
        total = sum(world.native_weight(row, expert) for expert in world.native[row])
        for expert in world.native[row]:
            share = world.native_weight(row, expert) / total if total else 0.0
            lost = (left[expert] if used[expert] else 1.0) if policy.select == "loss" else 1.0
            cost[expert] += share**2 * lost * (1.0 if policy.select == "squared" else energy[expert] / max(energy))
    return cost


@given(data=st.data())
def test_the_coreset_holds_what_costs_most(data: st.DataObject) -> None:
    trial: Trial = data.draw(trials(ROW, groups=False, guards=("",)))
    outcome, policy, world = trial.run(), trial.plan.policy, trial.world()
    size = twins.count(policy.budget, world.num_experts)
    for group in range(world.num_groups):
        if not world.voters(group):
            continue
        cost, free = costs(world, group, policy), world.free(group)
        warm = {e for row in world.voters(group) for e in world.order(row)[: policy.warmup]} - free
        chosen = set(outcome.coreset_GE[group].nonzero().flatten().tolist()) - free
        assert warm <= chosen
        assert len(chosen) == max(min(size, world.num_experts - len(free)), len(warm))
        outside = [cost[e] for e in range(world.num_experts) if e not in chosen | free]
        inside = [cost[e] for e in chosen - warm]
        if inside and outside:
            assert max(outside) <= min(inside) + 1e-6 * len(world.scores) + 1e-5 * max(outside)


@given(data=st.data())
def test_a_displaced_pair_is_computed_or_left(data: st.DataObject) -> None:
    """Each row's pairs are the model's own rule over what it may read and what its surrogates stand in for."""
    trial: Trial = data.draw(trials(ROW))
    outcome, world, policy = trial.run(), trial.world(), trial.plan.policy
    routing, left = outcome.routing, trial.plan.policy.prepare(trial.stats())["left"].tolist()
    if not policy.surrogates:
        assert routing.surrogate_ids_NK is None
        return
    low = 3e-2 if routing.weights_NK.dtype != torch.float32 or trial.case.logits_NE.dtype != torch.float32 else 2e-5
    for row in outcome.changed_N.nonzero().flatten().tolist():
        allowed = outcome.allowed_NE[row].tolist()
        native = [e for e in world.order(row) if e in world.native[row] and (allowed[e] or left[e])]
        others = [e for e in world.order(row) if allowed[e] and e not in world.native[row]]
        expected = world.mixed(row, (native + others)[: world.top_k])
        computed: dict[int, float] = {}
        for ids_NK, weights_NK in (
            (routing.ids_NK, routing.weights_NK),
            (routing.surrogate_ids_NK, routing.surrogate_weights_NK),
        ):
            for expert, weight in zip(ids_NK[row].tolist(), weights_NK[row].tolist(), strict=True):
                if weight:
                    assert allowed[expert] == (ids_NK is routing.ids_NK)
                    computed[expert] = computed.get(expert, 0.0) + weight
        for expert, weight in expected.items():
            assert computed.pop(expert, 0.0) == pytest.approx(weight, rel=low, abs=max(1e-7, low / 30))
        assert not computed


def test_the_sum_of_surrogates_is_the_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    E, R, H, N, K = 5, 3, 8, 4, 2
    tensors = {
        "surrogate_in": torch.randn(E, R, H, generator=generator),
        "surrogate_out": torch.randn(E, R + 1, H, generator=generator),
    }
    made = Surrogates.of(tensors)
    hidden_NH = torch.randn(N, H, generator=generator)
    ids_NK = torch.tensor([[0, 1], [4, 4], [2, 3], [3, 0]])
    weights_NK = torch.rand(N, K, generator=generator)
    found_NH = made(hidden_NH, ids_NK, weights_NK)
    for row in range(N):
        expected_H = torch.zeros(H)
        for expert, weight in zip(ids_NK[row].tolist(), weights_NK[row], strict=True):
            inner, outer = tensors["surrogate_in"][expert], tensors["surrogate_out"][expert]
            expected_H += weight * (outer[:R].T @ (inner @ hidden_NH[row]) + outer[R])
        torch.testing.assert_close(found_NH[row], expected_H)
    assert made.rank == R
    assert made.bytes == (2 * R + 1) * H * 4


def test_tensors_that_are_no_surrogates() -> None:
    inner, outer = torch.zeros(4, 2, 8), torch.zeros(4, 3, 8)
    with pytest.raises(CarpoolError, match="--surrogates"):
        Surrogates.of({"surrogate_in": inner})
    with pytest.raises(CarpoolError, match="do not fit together"):
        Surrogates.of({"surrogate_in": inner, "surrogate_out": inner})
    with pytest.raises(CarpoolError, match="factors"):
        Surrogates.of({"surrogate_in": inner.to(torch.int8), "surrogate_out": outer})
