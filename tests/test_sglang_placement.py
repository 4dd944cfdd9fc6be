"""Placements as SGLang itself reads them at `--init-expert-location`: its own code on our file, `make test-sglang`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from placement_tools import random_trace
from torch import Tensor

from carpool.artefacts.trace import Trace
from carpool.placement.demand import loads_LE
from carpool.placement.eplb import eplb
from carpool.placement.export import write_ktransformers, write_sglang
from carpool.placement.placement import Placement

pytest.importorskip("sglang", reason="SGLang is in a folder of its own: make test-sglang")
pytestmark = pytest.mark.slow

LAYERS, EXPERTS, RANKS = 3, 8, 4


@pytest.fixture(scope="module")
def trace() -> Trace:
    return random_trace(200, LAYERS, EXPERTS, 2, seed=2, skew=2.0)


def read(monkeypatch: pytest.MonkeyPatch, path: Path, redundant: int, rank: int = 0) -> Any:
    """SGLang's metadata of a model of these sizes with such arguments."""
    from sglang.srt.eplb import expert_location

    moe = SimpleNamespace(
        init_expert_location=str(path), ep_num_redundant_experts=redundant, ep_dispatch_algorithm="static",
        eplb_algorithm="deepseek", ep_join_mode=None, moe_a2a_backend="deepep",
    )  # fmt: skip
    parallel = SimpleNamespace(ep_size=RANKS, elastic_ep_initial_size=None, nnodes=1, tp_size=RANKS)
    settings = {
        "get_exec": SimpleNamespace(moe=moe), "get_device": SimpleNamespace(device="cpu"), "get_parallel": parallel,
        "_prefer_same_node_experts": False,
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setattr(expert_location, name, lambda value=value: value)
    sizes = expert_location.ModelConfigForExpertLocation(LAYERS, EXPERTS)
    monkeypatch.setattr(type(sizes), "from_model_config", staticmethod(lambda _: sizes))
    return expert_location.compute_initial_expert_location_metadata(None, moe_ep_rank=rank)


@pytest.fixture
def one_process() -> Iterator[None]:
    """The group in which SGLang's ranks agree on frequencies."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def places(found: Any, layer: int, expert: int) -> Tensor:
    where_X = found.logical_to_all_physical_map[layer, expert]
    return where_X[where_X >= 0]


@pytest.mark.parametrize("redundant", [0, RANKS])
def test_sglang_puts_experts_where_the_placement_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace: Trace, redundant: int
) -> None:
    placement = eplb(loads_LE(trace), RANKS, redundant=redundant)
    write_sglang(tmp_path / "location.json", placement, trace.facts.layers, LAYERS)
    for rank in range(RANKS):
        found = read(monkeypatch, tmp_path / "location.json", redundant, rank)
        assert found.ep_size == RANKS
        assert found.num_local_physical_experts == placement.slots
        assert torch.equal(found.physical_to_logical_map.view_as(placement.expert_LDS), placement.expert_LDS)
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                held_D = torch.zeros(RANKS, dtype=torch.bool)
                # with static dispatch SGLang lists a replica of the rank itself alone
                held_D[places(found, layer, expert) // placement.slots] = True
                assert (held_D <= placement.holds_LDE[layer, :, expert]).all()
                assert held_D.any()
            own_E = placement.holds_LDE[layer, rank]
            sent_E = found.logical_to_rank_dispatch_physical_map[layer]
            assert (sent_E[own_E] // placement.slots == rank).all(), "what the rank holds stays on it"


@pytest.mark.usefixtures("one_process")
def test_sglang_balances_by_the_frequencies_of_a_trace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trace: Trace
) -> None:
    """KTransformers' file is SGLang's own record of loads: its EPLB makes of it what ours does."""
    write_ktransformers(tmp_path / "counts.pt", trace, LAYERS)
    found = read(monkeypatch, tmp_path / "counts.pt", RANKS)
    expected: Placement = eplb(loads_LE(trace), RANKS, redundant=RANKS)
    assert torch.equal(found.physical_to_logical_map.view_as(expected.expert_LDS), expected.expert_LDS)
