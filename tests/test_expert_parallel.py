"""Sharing in transformers' own expert parallelism, on 2 and 4 gloo ranks, and experts in the order of a plan."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_models import tiny_model
from torch import Tensor

import carpool
from carpool import Batch, CarpoolError
from carpool.experts.permuted import permuted
from carpool.hosts.transformers import find_layers
from carpool.hosts.transformers.expert_parallel import device_of, require_dispatch, whole
from carpool.placement.baselines import linear, random
from carpool.placement.eplb import eplb

EXPERTS, TOP_K = 8, 2
IDS = torch.arange(24).view(3, 8) % 60 + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and the same with its experts in a random order."""
    path = tmp_path_factory.mktemp("models")
    model = tiny_model("qwen3_moe", num_attention_heads=4, num_key_value_heads=4)
    model.save_pretrained(path / "plain")
    with permuted(find_layers(model), random(2, EXPERTS, 4, seed=1).expert_LDS, model.config):
        model.save_pretrained(path / "permuted")
    return path


def load(path: Path, **how: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **how).eval()


@torch.no_grad()
def logits(model: Any, plan: str | None, **how: Any) -> tuple[Tensor, list[dict[str, int]]]:
    if plan is None:
        return whole(model(IDS, use_cache=False).logits), []
    with carpool.share(model, plan, exempt_prefill=False, **how) as run:
        found = whole(model(IDS, use_cache=False).logits)
    return found, [{"union": one.union, "changed": one.rows_changed} for one in run.report()]


def on_ranks(folder: Path) -> dict[str, Any]:
    """On a rank: logits and reports by plan, and the experts that the rank computed in each layer and forward."""
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import EpDispatchExpertsParallel

    ranks, rank = dist.get_world_size(), dist.get_rank()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    spread = DistributedConfig(tp_size=ranks, ep_size=ranks)
    model = load(folder / "plain", distributed_config=spread)
    computed: list[list[int]] = []
    run_experts = EpDispatchExpertsParallel._run_local_experts

    def spy(self: Any, forward: Any, tokens: Tensor, expert_ids: Tensor) -> Tensor:
        computed.append(sorted({*(expert_ids + rank * EXPERTS // ranks).tolist()}))
        return run_experts(self, forward, tokens, expert_ids)

    EpDispatchExpertsParallel._run_local_experts = spy
    found: dict[str, Any] = {}
    for plan in (None, "xshare(budget=4)", "oea(k0=1)", "xshare_expert_parallel(1, warmup=0)"):
        computed.clear()
        found[str(plan)] = (*logits(model, plan), [*computed])
    found["stock again"] = (*logits(model, None), [])
    found["permuted"] = (*logits(load(folder / "permuted", distributed_config=spread), None), [])
    masks = {"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"}
    masked = load(folder / "plain", distributed_config=DistributedConfig(tp_size=ranks, ep_size=ranks, ep_plan=masks))
    try:
        logits(masked, "oea(k0=1)")
    except CarpoolError as error:
        found["refused"] = str(error)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_sharing_on_ranks_is_sharing_in_one_process(folder: Path, ranks: int) -> None:
    found = run_ranks(on_ranks, ranks, folder)
    model = load(folder / "plain")
    device_E = torch.arange(EXPERTS) * ranks // EXPERTS
    for plan in (None, "xshare(budget=4)", "oea(k0=1)", "xshare_expert_parallel(1, warmup=0)"):
        how = {}
        if plan is not None and "parallel" in plan:
            how["batch"] = Batch.of(IDS.numel(), device_E=device_E)
        expected, report = logits(model, plan, **how)
        for one in found:
            own, own_report, _ = one[str(plan)]
            assert torch.allclose(own, expected, atol=2e-5), plan
            assert own_report == report
        if plan is None:
            continue
        assert sum(row["changed"] for row in report) > 0
        by_rank = [one[str(plan)][2] for one in found]
        for layer in range(2):
            here = [set(computed[layer]) for computed in by_rank]
            assert sum(map(len, here)) == report[layer]["union"]  # every rank computes its own experts, once
            assert all(int(device_E[e]) == rank for rank, experts in enumerate(here) for e in experts)
            if "parallel" in plan:
                assert max(map(len, here)) <= 1 < max(len(one["None"][2][layer]) for one in found)
    for one in found:
        assert torch.equal(one["stock again"][0], one["None"][0])
        assert torch.allclose(one["permuted"][0], one["None"][0], atol=2e-5)
        assert "by masks on its routers" in one["refused"]


def test_experts_in_another_order_compute_the_same(folder: Path) -> None:
    plain, other = load(folder / "plain"), load(folder / "permuted")
    order_LE = random(2, EXPERTS, 4, seed=1).expert_LDS.flatten(1)
    assert torch.allclose(logits(plain, None)[0], logits(other, None)[0], atol=2e-6)
    for layer, (one, two) in enumerate(zip(find_layers(plain), find_layers(other), strict=True)):
        assert torch.equal(one.weight_EH[order_LE[layer]], two.weight_EH)
        assert torch.equal(one.experts.down_proj[order_LE[layer]], two.experts.down_proj)


def test_orders_that_no_checkpoint_has_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    layers = find_layers(model)
    for plan, said in (
        (linear(1, EXPERTS, 4), "of 1 layers, the model has 2"),
        (eplb(torch.ones(2, EXPERTS), 4, redundant=4), "plan without --redundant"),
    ):
        with pytest.raises(CarpoolError, match=said), permuted(layers, plan.expert_LDS, model.config):
            pass
    grouped = find_layers(tiny_model("deepseek_v3"))
    with (
        pytest.raises(CarpoolError, match="groups of experts"),
        permuted(grouped, linear(len(grouped), EXPERTS, 4).expert_LDS, model.config),
    ):
        pass


def test_the_ranks_of_experts_are_known() -> None:
    assert device_of(torch.nn.Identity(), 8) is None
    assert device_of(SimpleNamespace(num_experts=8, _is_expert_parallel=True), 8) is None  # type: ignore[arg-type]
    spread = SimpleNamespace(num_experts=2, _is_expert_parallel=True)
    found = device_of(spread, 8)  # type: ignore[arg-type]
    assert found is not None
    assert found.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    require_dispatch(torch.nn.Identity())
