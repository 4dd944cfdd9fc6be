"""A placement as vLLM's policy of expert parallelism, through vLLM's own functions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from placement_tools import random_trace

from carpool import CarpoolError
from carpool.hosts.vllm.placement import PLACEMENT, planned, use_placement
from carpool.placement.demand import loads_LE
from carpool.placement.eplb import eplb
from carpool.placement.placement_file import PlacementFile

pytestmark = pytest.mark.slow  # importing vLLM takes long
pytest.importorskip("vllm")


@pytest.fixture
def file(tmp_path):
    trace = random_trace(200, 3, 8, 2, seed=2, skew=2.0)
    placement = eplb(loads_LE(trace), 4, 2, redundant=4)
    PlacementFile(placement, trace.facts.layers).save(tmp_path / "placement.json")
    return tmp_path / "placement.json"


def test_vllm_gets_the_plan_whatever_the_loads(file):
    from vllm.distributed.eplb.eplb_state import compute_logical_maps
    from vllm.distributed.eplb.migration_scheduler import schedule_migration_batches  # noqa: F401  (it is there)

    placement, policy = PlacementFile.load(file).placement, planned(file)
    for seed in range(3):
        load_LE = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed))
        map_LR = policy.rebalance_experts(load_LE, 12, 1, 2, 4)
        assert map_LR.dtype == torch.int64
        assert map_LR.device.type == "cpu"
        assert torch.equal(map_LR, placement.expert_LDS.flatten(1))
    physical, count_LE = compute_logical_maps(map_LR, 8)
    assert int(count_LE.sum()) == 3 * 12
    for layer, expert in ((0, 0), (1, 5), (2, 7)):
        places = [place for place in physical[layer, expert].tolist() if place >= 0]
        assert (map_LR[layer, places] == expert).all()
        assert len(places) == int(count_LE[layer, expert])


def test_experts_that_stay_keep_their_slots(file):
    placement, policy = PlacementFile.load(file).placement, planned(file)
    old_LR = placement.expert_LDS.flip(2).flatten(1)  # the same devices, other slots
    assert torch.equal(policy.rebalance_experts(torch.ones(3, 8), 12, 1, 2, 4, old_LR), old_LR)


@pytest.mark.parametrize("asked", [(torch.ones(2, 8), 12, 4), (torch.ones(3, 8), 16, 4), (torch.ones(3, 8), 12, 2)])
def test_a_plan_of_other_sizes_is_refused_in_one_sentence(file, asked):
    load_LE, replicas, ranks = asked
    with pytest.raises(
        CarpoolError, match=r"is for 3 layers of 8 experts in 12 places on 4 ranks, vLLM has .* plan with"
    ):
        planned(file).rebalance_experts(load_LE, replicas, 1, 1, ranks)


def test_the_worker_swaps_the_policy_that_vllm_reads_later(file, monkeypatch):
    from vllm.distributed.eplb import policy

    monkeypatch.setitem(policy.EPLB_POLICIES, "default", policy.EPLB_POLICIES["default"])
    before = policy.EPLB_POLICIES["default"]
    parallel = SimpleNamespace(enable_eplb=True, eplb_config=SimpleNamespace(policy="default"))
    use_placement(SimpleNamespace(additional_config={"other": 1}, parallel_config=parallel))
    assert policy.EPLB_POLICIES["default"] is before
    config = SimpleNamespace(additional_config={PLACEMENT: str(file)}, parallel_config=parallel)
    use_placement(config)
    assert policy.EPLB_POLICIES["default"].__name__ == "Planned"
    parallel.enable_eplb = False
    with pytest.raises(CarpoolError, match="--enable-eplb"):
        use_placement(config)
    with pytest.raises(CarpoolError, match="give the path"):
        planned(3)
