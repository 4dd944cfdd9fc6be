"""Scores against loops, the cost model, what is recommended, sharing, placement files and exports."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isnan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_tools import random_holders, random_trace

from carpool import CarpoolError
from carpool.placement.baselines import linear, random
from carpool.placement.compare import advise, compare
from carpool.placement.cost import CostModel, fit, usable
from carpool.placement.demand import loads_LE
from carpool.placement.dispatch import WAYS, bounds, rows_sent, way
from carpool.placement.eplb import eplb
from carpool.placement.export import expert_frequencies, physical_to_logical, write_ktransformers, write_sglang
from carpool.placement.placement import Placement
from carpool.placement.placement_file import PlacementFile
from carpool.placement.planners import PLANNERS, Sizes, planner
from carpool.placement.replicas import KNUTH, device_NK
from carpool.placement.score import places, score
from carpool.placement.sharing import share


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 100), st.sampled_from(["linear", "random", "eplb"]), st.sampled_from(["hash", "metro"]))
def test_scores_are_what_a_loop_counts(seed, name, rule):
    trace = random_trace(40, 2, 8, 2, seed=seed)
    placement = {"linear": linear(2, 8, 4, 2), "random": random(2, 8, 4, 2, seed=seed)}.get(name) or eplb(
        loads_LE(trace), 4, 2, redundant=4
    )
    found = score(placement, trace, rule)
    peak_tokens, peak, fan, nodes, sent, pairs_sent, hops = [], [], 0, 0, 0, 0, 0
    before = torch.zeros(40)
    for layer in range(2):
        step_T, row_T = places(trace)
        device = device_NK(
            trace.experts_TLK[:, layer].long(), torch.ones(40, 2, dtype=torch.bool), placement.holds_LDE[layer], step_T,
            row_T, rule,
        )  # fmt: skip
        for rows in trace.steps():
            pairs, read = [0] * 4, [set() for _ in range(4)]
            for row in range(rows.start, rows.stop):
                for slot in range(2):
                    expert, at = int(trace.experts_TLK[row, layer, slot]), int(device[row, slot])
                    assert placement.holds_LDE[layer, at, expert]
                    pairs[at] += 1
                    read[at].add(expert)
            peak_tokens.append(max(pairs) / (sum(pairs) / 4))
            peak.append(max(map(len, read)))
        for row in range(40):
            home, on = int(trace.request_T[row]) % 4, set(device[row].tolist())
            fan += len(on)
            sent += len(on - {home})
            pairs_sent += sum(at != home for at in device[row].tolist())
            nodes += len({at // 2 for at in on} - {home // 2})
        hops += int((device[:, 0] != before).sum()) if layer else 0
        before = device[:, 0]
    assert found.peak_tokens == pytest.approx(sum(peak_tokens) / len(peak_tokens))
    assert found.peak_activated == pytest.approx(sum(peak) / len(peak))
    assert found.fan_out == pytest.approx(fan / 80)
    assert found.node_rows == pytest.approx(nodes / 80)
    assert found.hops == pytest.approx(hops / 40)
    expected = {"deepep": sent / 80, "alltoall": pairs_sent / 80, "allgather": 3.0, "coherent": hops / 40}
    assert found.rows_sent == pytest.approx(expected)
    assert found.bytes_sent("deepep", 16) == pytest.approx(sent / 80 * 16 * 2 * 2)
    assert found.bytes_sent("coherent", 16) == pytest.approx(hops / 40 * 16 * 2)


@given(st.integers(1, 4), st.integers(2, 8), st.integers(0, 8), st.integers(0, 100))
def test_a_row_is_computed_where_its_expert_lies(devices, experts, replicas, seed):
    holds_DE = random_holders(devices, experts, replicas, seed)
    ids_NK = torch.rand(12, experts, generator=torch.Generator().manual_seed(seed)).topk(2, -1).indices
    asked_NK = torch.rand(12, 2, generator=torch.Generator().manual_seed(seed)) < 0.8
    for rule in ("hash", "metro"):
        device = device_NK(ids_NK, asked_NK, holds_DE, torch.arange(12) // 4, torch.arange(12) % 4, rule)
        assert ((device >= 0) == asked_NK).all()
        assert holds_DE[device[asked_NK], ids_NK[asked_NK]].all()
        for row, slot in asked_NK.nonzero().tolist():
            holders = holds_DE[:, ids_NK[row, slot]].nonzero().flatten().tolist()
            if rule == "hash":  # as vLLM's kernel
                assert device[row, slot] == holders[((row % 4) * KNUTH & 0xFFFFFFFF) % len(holders)]
    with pytest.raises(CarpoolError, match="replicas chosen by 'dice'"):
        device_NK(ids_NK, asked_NK, holds_DE, torch.zeros(12), torch.zeros(12), "dice")


def test_volumes_lie_between_their_bounds():
    device_NK, home_N = torch.tensor([[0, 1], [2, -1], [3, 3]]), torch.tensor([0, 2, 0])
    assert [rows_sent(name, device_NK, home_N, 4) for name in ("allgather", "deepep", "alltoall")] == [9, 2, 3]
    limits = bounds(2, 16, 4)
    assert limits["tp"] == (96, 96)
    assert limits["allgather"] == (192, 192)
    for name, most in (("deepep", 2), ("alltoall", 2)):
        assert limits[name] == (0, most * 64)
    with pytest.raises(CarpoolError, match="use one of allgather, deepep, alltoall, coherent"):
        way("carrier")


def test_the_cost_model_finds_its_own_numbers():
    model = CostModel(2.0, 0.5, 1.0, 0.01)
    experts_R = torch.tensor([1, 4, 8, 16, 2, 2, 2, 2])
    pairs_R = torch.tensor([4, 8, 16, 30, 400, 800, 1600, 3200])
    found = fit(experts_R, pairs_R, model.devices(experts_R, pairs_R))
    assert (found.a, found.b, found.c, found.d) == pytest.approx((2.0, 0.5, 1.0, 0.01), rel=1e-6)
    assert model.bound_by(8, 16) == "experts"
    assert model.bound_by(2, 3200) == "tokens"
    activated, pairs = torch.tensor([[1, 3], [2, 2]]), torch.tensor([[2, 2], [1000, 2]])
    assert model.layer(activated, pairs) == pytest.approx((3.5 + 11.0) / 2)
    assert replace(model, link=10).layer(activated, pairs, 20) == pytest.approx((3.5 + 11.0) / 2 + 2)
    assert CostModel.parse("2,0.5,1,0.01,10") == replace(model, link=10)
    for text in ("1,2", "a,b,c,d", "1,2,3,inf", "1,2,3,4,5,6"):
        with pytest.raises(CarpoolError, match="--cost"):
            CostModel.parse(text)
    with pytest.raises(CarpoolError, match="negative"):
        CostModel.parse("1,-2,3,4")
    with pytest.raises(CarpoolError, match="3 measurements"):
        fit(experts_R[:3], pairs_R[:3], torch.ones(3))


def test_nothing_is_recommended_that_the_dispatch_cannot_use():
    trace = random_trace(128, 3, 8, 2, seed=1)
    for name in WAYS:
        rows = compare(trace, Sizes(4), name)
        advice = advise(rows, name)
        refused = {row.planner.name for row in rows if row.unusable}
        assert {"exflow", "moetuner"} <= refused  # two experts a token: even ExFlow's way has no one device to stay on
        assert ("fan-out" in refused) == (name != "deepep")
        assert len(advice.refused) == len(refused)
        assert not any(name in said for name in refused for said in advice.use)
    assert "goes home between layers" in usable("hops", "deepep", 1)
    assert usable("hops", "coherent", 1) == ""
    rows = compare(random_trace(128, 3, 8, 1, seed=1), Sizes(4), "coherent", cost=CostModel(1, 1, 1, 1))
    assert not [row for row in rows if row.planner.objective == "hops" and row.unusable]
    assert all(row.micros is not None and row.micros >= 2 for row in rows)
    assert len(advise(rows, "coherent").use) == 1
    one = compare(random_trace(64, 1, 8, 2), Sizes(4), "deepep", planners=PLANNERS[:1])[0]
    assert isnan(one.later.hops)


def test_sharing_lowers_the_peak_to_its_cap():
    trace = random_trace(64, 2, 8, 2, seed=3)
    placement = linear(2, 8, 4)
    found = share(placement, trace, "xshare_expert_parallel(budget_per_device=1, warmup=0)")
    assert found.peak <= 1 < found.natural_peak
    assert found.natural_peak == pytest.approx(score(placement, trace).peak_activated)
    assert 0 < found.displaced < 1
    same = share(placement, trace, "xshare_expert_parallel(budget_per_device=1.0)")
    assert (same.peak, same.displaced) == (same.natural_peak, 0)
    with pytest.raises(CarpoolError, match="the trace has none"):
        share(placement, replace(trace, weights_TLK=None), "oea(k0=1)")
    with pytest.raises(CarpoolError, match="needs statistics"):
        share(placement, trace, "sere(top=1, threshold=0.5)")
    with pytest.raises(CarpoolError, match="the placement is of 2 layers of 8"):
        share(placement, random_trace(64, 3, 8), "oea(k0=1)")


def test_a_plan_file_says_whose_it_is(tmp_path):
    placement = replace(eplb(loads_LE(random_trace(64, 2, 8, 2)), 4, 2, redundant=4), seed=5)
    PlacementFile(placement, (1, 3), "f" * 64, "0" * 64).save(tmp_path / "placement.json")
    found = PlacementFile.load(tmp_path / "placement.json")
    assert (found.layers, found.fingerprint, found.trace) == ((1, 3), "f" * 64, "0" * 64)
    assert torch.equal(found.placement.expert_LDS, placement.expert_LDS)
    for name in ("num_experts", "nodes", "method", "objective", "value", "bound", "status", "seed"):
        assert getattr(found.placement, name) == getattr(placement, name)
    given = json.loads((tmp_path / "placement.json").read_text())
    for said, wrong in (
        ("is no placement of carpool", {}),
        ("has schema 9", {**given, "carpool_placement": 9}),
        ("'nodes' is missing", {**given, "nodes": "2"}),
        ("not numbers by layer", {**given, "experts": [[1], [2, 3]]}),
        ("holds expert 8 of 8", {**given, "experts": [[[8, 8], [0, 1]]] * 2}),
        ("names them", {**given, "layers": [1]}),
    ):
        (tmp_path / "placement.json").write_text(json.dumps(wrong))
        with pytest.raises(CarpoolError, match=said):
            PlacementFile.load(tmp_path / "placement.json")


def test_exports_have_the_shapes_that_engines_read(tmp_path):
    trace = random_trace(64, 2, 8, 2)
    trace = replace(trace, facts=replace(trace.facts, layers=(1, 3)))
    placement = eplb(loads_LE(trace), 4, redundant=4)
    write_sglang(tmp_path / "location.json", placement, (1, 3), 5)
    given = json.loads((tmp_path / "location.json").read_text())
    assert list(given) == ["physical_to_logical_map"]
    map_LR = torch.tensor(given["physical_to_logical_map"])
    assert map_LR.shape == (5, 12)
    assert torch.equal(map_LR[1], placement.expert_LDS[0].flatten())
    assert torch.equal(map_LR[0], torch.arange(12) % 8)  # a dense layer
    with pytest.raises(CarpoolError, match="a layer 3, the model has 3"):
        physical_to_logical(placement, (1, 3), 3)
    write_ktransformers(tmp_path / "counts.pt", trace, 5)
    counts = torch.load(tmp_path / "counts.pt", weights_only=True)["logical_count"]
    assert counts.shape == (1, 5, 8)
    assert torch.equal(counts[0], expert_frequencies(trace, 5))
    assert counts[0, [0, 2, 4]].sum() == 0
    assert counts.sum() == 64 * 2 * 2


def test_planners_by_name():
    assert planner("eplb").objective == "peak_tokens"
    with pytest.raises(CarpoolError, match="no planner is named 'best'"):
        planner("best")
    assert isinstance(planner("fan-out").make(random_trace(), Sizes(4)), Placement)
