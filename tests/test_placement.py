"""Planners against slow twins, engines' own code, exact optima, and what has to hold for every placement."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_tools import every_placement, random_holders, random_trace, slow_eplb, slow_fan_out, slow_hops

from carpool import CarpoolError
from carpool.placement.baselines import linear, random, round_robin
from carpool.placement.demand import coactivation_LEE, loads_LE, transitions_JEE
from carpool.placement.eplb import eplb, even_loads, physical_to_logical
from carpool.placement.exflow import exflow, hops
from carpool.placement.exflow_exact import exflow_exact
from carpool.placement.fanout import fan_out
from carpool.placement.metro import activated_XD, fewest_activated, least_peak
from carpool.placement.moetuner import moetuner
from carpool.placement.placement import Placement, slots_for

README = torch.tensor([
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
])  # fmt: skip


def test_eplb_on_deepseeks_own_example():
    placement = eplb(README, devices=8, nodes=2, redundant=4, groups=4)
    assert placement.expert_LDS.flatten(1).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


SHAPES = st.sampled_from([(8, 8, 1, 1, 2), (8, 12, 4, 2, 4), (12, 16, 4, 2, 8), (16, 16, 1, 1, 16), (16, 24, 3, 2, 8)])


@given(SHAPES, st.integers(0, 1000))
def test_eplb_is_its_slow_twin(shape, seed):
    experts, replicas, groups, nodes, devices = shape
    groups = 1 if experts % groups else groups
    load_LE = torch.randint(0, 6, (3, experts), generator=torch.Generator().manual_seed(seed))  # with ties
    found = physical_to_logical(load_LE, replicas, groups, nodes, devices)
    assert found.tolist() == [slow_eplb(load.tolist(), replicas, groups, nodes, devices) for load in load_LE]


@pytest.mark.slow
@settings(deadline=None)
@given(SHAPES, st.integers(0, 1000))
def test_eplb_is_what_vllm_runs(shape, seed):
    policy = pytest.importorskip("vllm.distributed.eplb.policy.default").DefaultEplbPolicy
    experts, replicas, groups, nodes, devices = shape
    groups = 1 if experts % groups else groups
    generator = torch.Generator().manual_seed(seed)
    load_LE = torch.randperm(100_000, generator=generator)[: 3 * experts].view(3, experts)  # its ties are open
    theirs = policy.rebalance_experts(load_LE, replicas, groups, nodes, devices)
    assert torch.equal(physical_to_logical(load_LE, replicas, groups, nodes, devices), theirs)


@settings(deadline=None)
@given(st.integers(0, 200), st.sampled_from([0, 4, 8]))
def test_eplb_keeps_its_bound(seed, redundant):
    load_LE = torch.randint(1, 1000, (4, 16), generator=torch.Generator().manual_seed(seed))
    placement = eplb(load_LE, 4, redundant=redundant)
    assert placement.bound is not None
    assert placement.bound <= placement.value + 1e-9
    peak_L = even_loads(placement, load_LE).amax(-1)
    assert placement.value == pytest.approx(float(peak_L.mean()))
    assert torch.allclose(even_loads(placement, load_LE).sum(-1), load_LE.sum(-1).double())


@given(st.integers(1, 5), st.integers(2, 12), st.integers(0, 12), st.integers(0, 10_000), st.booleans())
def test_metro_serves_every_active_expert_where_it_lies(devices, experts, replicas, seed, fewest_first):
    holds_DE = random_holders(devices, experts, replicas, seed)
    active_XE = torch.rand(6, experts, generator=torch.Generator().manual_seed(seed)) < 0.6
    device_XE = fewest_activated(active_XE, holds_DE, fewest_first=fewest_first)
    assert ((device_XE >= 0) == active_XE).all()
    step, expert = active_XE.nonzero(as_tuple=True)
    assert holds_DE[device_XE[step, expert], expert].all()
    counted = activated_XD(device_XE, devices)
    assert torch.equal(counted.sum(-1), active_XE.sum(-1))
    for step, (active_E, own_E) in enumerate(zip(active_XE, device_XE, strict=True)):  # greedy, one step at a time
        load = [0] * devices
        order = sorted(range(experts), key=lambda e: int(holds_DE[:, e].sum())) if fewest_first else range(experts)
        for one in order:
            if active_E[one]:
                best = min((d for d in range(devices) if holds_DE[d, one]), key=lambda d: (load[d], d))
                assert best == own_E[one]
                load[best] += 1
        assert load == counted[step].tolist()


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 5), st.integers(0, 1000))
def test_least_peak_is_the_optimum_of_all_choices(devices, experts, replicas, seed):
    holds_DE = random_holders(devices, experts, replicas, seed)
    active_E = torch.rand(experts, generator=torch.Generator().manual_seed(seed)) < 0.7
    choices = [holds_DE[:, e].nonzero().flatten().tolist() for e in active_E.nonzero().flatten().tolist()]
    best = min(max((chosen.count(d) for d in range(devices)), default=0) for chosen in product(*choices))
    assert least_peak(active_E, holds_DE) == best
    greedy = activated_XD(fewest_activated(active_E.unsqueeze(0), holds_DE), devices)
    assert best <= int(greedy.max())


def test_metro_needs_a_holder():
    holds_DE = torch.tensor([[True, False]])
    with pytest.raises(CarpoolError, match="no device holds expert 1"):
        fewest_activated(torch.tensor([[True, True]]), holds_DE)
    with pytest.raises(CarpoolError, match="no device holds expert 1"):
        least_peak(torch.tensor([True, True]), holds_DE)
    assert fewest_activated(torch.tensor([[True, False]]), holds_DE).tolist() == [[0, -1]]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_exflow_counts_hops_and_comes_near_the_optimum(seed):
    trace = random_trace(40, 3, 4, 1, seed=seed)
    moves_JEE = transitions_JEE(trace, best_only=True)
    best = min(every_placement(3, 4, 2), key=lambda device_LE: hops(moves_JEE, device_LE))
    exact = exflow_exact(moves_JEE, 2)
    assert exact.status == "optimal"
    assert exact.value == exact.bound == hops(moves_JEE, best) == slow_hops(trace, exact.device_LE)
    descended = exflow(moves_JEE, 2, seed=seed)
    assert descended.value == slow_hops(trace, descended.device_LE)
    assert exact.value <= descended.value <= hops(moves_JEE, linear(3, 4, 2).device_LE)
    assert torch.equal(exflow(moves_JEE, 2, seed=seed).expert_LDS, descended.expert_LDS)


def test_exflow_goes_by_nodes_first():
    trace = random_trace(200, 4, 16, 1, seed=3)
    moves_JEE = transitions_JEE(trace, best_only=True)
    placement = exflow(moves_JEE, 8, 2, starts=3)
    flat = exflow(moves_JEE, 8, starts=3)
    node_hops = [hops(moves_JEE, one.device_LE // 4) for one in (placement, flat, linear(4, 16, 8))]
    assert node_hops[0] <= node_hops[1]
    assert node_hops[0] < node_hops[2]
    assert torch.equal(exflow(moves_JEE, 2, 2, starts=1).device_LE, exflow(moves_JEE, 2, starts=1).device_LE)


@given(st.integers(0, 100))
def test_moetuner_balances_first(seed):
    trace = random_trace(100, 3, 8, 2, seed=seed)
    moves_JEE, load_LE = transitions_JEE(trace), loads_LE(trace)
    placement = moetuner(load_LE, moves_JEE, 4)
    assert placement.value == slow_hops(trace, placement.device_LE, best_only=False)
    balanced = eplb(load_LE, 4)
    assert torch.equal(even_loads(placement, load_LE).amax(-1), even_loads(balanced, load_LE).amax(-1))
    assert placement.value <= hops(moves_JEE, balanced.device_LE)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 100), st.sampled_from([1.0, 1.25, 4.0]))
def test_fan_out_counts_right_and_keeps_the_load(seed, max_load):
    trace = random_trace(60, 2, 8, 3, seed=seed)
    placement = fan_out(trace, 4, max_load=max_load, seed=seed)
    assert placement.value == pytest.approx(slow_fan_out(trace, placement.device_LE))
    in_order = linear(2, 8, 4)
    assert placement.value <= slow_fan_out(trace, in_order.device_LE)
    assert placement.bound == 2 <= placement.value
    load_LE = loads_LE(trace)
    allowed_L = torch.maximum(load_LE.sum(-1) / 4 * max_load, even_loads(in_order, load_LE).amax(-1))
    assert (even_loads(placement, load_LE).amax(-1) <= allowed_L + 1e-9).all()


def test_fan_out_finds_experts_that_are_always_together():
    trace = random_trace(64, 1, 8, 2)
    pairs_T = torch.arange(64) % 4
    together = torch.stack([pairs_T, pairs_T + 4], -1).unsqueeze(1).to(torch.uint8)
    found = fan_out(replace(trace, experts_TLK=together), 4)
    assert found.value == 1
    assert {tuple(sorted(one)) for one in found.expert_LDS[0].tolist()} == {(e, e + 4) for e in range(4)}


@given(st.integers(0, 50), st.sampled_from([(4, 1), (4, 2), (2, 2), (1, 1), (8, 4)]))
@settings(max_examples=10, deadline=None)
def test_every_plan_places_every_expert_evenly(seed, sizes):
    devices, nodes = sizes
    trace = random_trace(60, 2, 8, 2, seed=seed)
    moves_JEE, load_LE = transitions_JEE(trace), loads_LE(trace)
    placements = [
        linear(2, 8, devices, nodes), round_robin(2, 8, devices, nodes), random(2, 8, devices, nodes, seed=seed),
        eplb(load_LE, devices, nodes), exflow(moves_JEE, devices, nodes, starts=1), fan_out(trace, devices, nodes),
        moetuner(load_LE, moves_JEE, devices, nodes),
    ]  # fmt: skip
    for placement in placements:
        assert (placement.replicas_LE == 1).all(), placement.method
        assert placement.wasted == 0
        assert (placement.devices, placement.nodes, placement.slots) == (devices, nodes, 8 // devices)
        again = torch.stack([placement.device_LE[at][one] for at, one in enumerate(placement.expert_LDS.flatten(1))])
        assert torch.equal(again, torch.arange(devices).repeat_interleave(8 // devices).expand(2, -1))
        assert placement.moved_from(placement) == 0
    if devices == 1:
        return
    replicated = eplb(load_LE, devices, nodes, redundant=devices)
    assert (replicated.replicas_LE >= 1).all()
    assert int(replicated.holds_LDE.sum()) + replicated.wasted == 2 * (8 + devices)


def test_demand_is_what_a_loop_counts():
    trace = random_trace(30, 2, 6, 2)
    freed = replace(trace, weights_TLK=trace.weights_TLK.clone().index_fill_(2, torch.tensor([1]), 0))
    for one, top_k in ((trace, 2), (freed, 1)):
        chosen = [[row[:top_k] for row in one.experts_TLK[:, layer].tolist()] for layer in range(2)]
        for layer in range(2):
            together = coactivation_LEE(one)[layer]
            for a, b in product(range(6), repeat=2):
                assert together[a, b] == sum(a in row and b in row for row in chosen[layer])
            assert torch.equal(together.diagonal(), loads_LE(one)[layer])
        for a, b in product(range(6), repeat=2):
            rows = zip(*chosen, strict=True)
            assert transitions_JEE(one)[0, a, b] == sum(a in here and b in there for here, there in rows)


@pytest.mark.parametrize(
    ("said", "made"),
    [
        ("8 devices do not divide into 3 nodes", lambda: slots_for(64, 8, 3)),
        ("give --redundant 2, 8, ...", lambda: slots_for(64, 6)),
        ("more than there are experts", lambda: slots_for(2, 2, redundant=4)),
        ("do not divide into 3 groups", lambda: eplb(torch.ones(1, 8), 4, groups=3)),
        ("max_load=0.5", lambda: fan_out(random_trace(), 4, max_load=0.5)),
        ("no slot for expert 3 of layer 0", lambda: Placement(torch.tensor([[[0, 1], [2, 2]]]), 4)),
        ("holds expert 4 of 4", lambda: Placement(torch.tensor([[[0, 1], [2, 4]]]), 4)),
        ("do not divide into 2 nodes", lambda: Placement(torch.tensor([[[0, 1, 2]]]), 3, 2)),
        ("of different models", lambda: linear(1, 8, 4).moved_from(linear(1, 8, 2))),
    ],
)
def test_impossible_plans_are_refused(said, made):
    with pytest.raises(CarpoolError, match=said):
        made()
