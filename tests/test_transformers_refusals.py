"""What the transformers host refuses, and the statistics and fingerprints it checks."""

from __future__ import annotations

import copy
import multiprocessing
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tokens

import carpool
from carpool import CarpoolError
from carpool.hosts.transformers import attach, find_layers, fingerprint

TIGHT = "xshare(budget=2, warmup=0)"


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen3_moe")


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


def test_a_router_that_does_not_follow_its_rule_is_refused_at_attach(model: Any) -> None:
    router = model.model.layers[1].mlp.gate
    stock = router.forward

    def next_experts(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        router_logits, weights, ids = stock(hidden)
        return router_logits, weights, (ids + 1) % 8

    router.forward = next_experts
    with pytest.raises(CarpoolError, match=r"layers\.1\.mlp: Qwen3MoeTopKRouter picks other experts"):
        attach(model)


def test_statistics_are_used_and_checked(model: Any) -> None:
    from carpool.artefacts.statistics import Statistics

    def similar(best: int) -> dict[str, torch.Tensor]:
        similarity_EE = torch.full((8, 8), 0.1).fill_diagonal_(1.0)
        similarity_EE[best, :] = similarity_EE[:, best] = 0.9
        similarity_EE[best, best] = 1.0
        return {"similarity_frobenius": similarity_EE, "coverage": torch.full((8,), 300)}

    def layers() -> dict[int, dict[str, torch.Tensor]]:
        tensors = {layer.index: layer.sample().tensors for layer in find_layers(model)}
        return {0: {**similar(2), **tensors[0]}, 1: {**similar(5), **tensors[1]}}

    made_of: dict[str, Any] = {
        "architecture": "Qwen3MoeForCausalLM", "num_experts": 8, "top_k": 2, "hidden_size": 32, "tokens": 1200,
        "seed": 0, "data": (("a.txt", "0" * 64),), "created": "2026-01-01T00:00:00+00:00", "carpool_version": "0",
        "torch_version": "0",
    }  # fmt: skip
    own = Statistics(layers=layers(), fingerprint=fingerprint(model), **made_of)
    with carpool.share(model, "sere(top=1)", stats=own, exempt_prefill=False, group="position") as run:
        logits(model, tokens())
    assert run.changed_rows() > 0
    foreign = Statistics(layers=layers(), fingerprint="0" * 64, **made_of)
    with pytest.raises(CarpoolError, match="another model"), carpool.share(model, "sere(top=1)", stats=foreign):
        pass
    with (
        pytest.raises(CarpoolError, match=r"similarity_cka.*carpool calibrate"),
        carpool.share(model, "sere(top=1, metric='cka')", stats=own),
    ):
        pass


def test_expert_parallelism_by_masks_is_refused(model: Any) -> None:
    from transformers.distributed import DistributedConfig

    model.config.distributed_config = DistributedConfig(tp_size=2, ep_size=2)
    model.ep_plan = {"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"}
    with pytest.raises(CarpoolError, match=r"spread over 2 processes \(DistributedConfig\).*without expert"):
        attach(model)


def test_experts_spread_over_processes_are_refused() -> None:
    # in a process of its own: a process has one default group, and an engine of another test may have made it
    child = multiprocessing.get_context("spawn").Process(target=_attach_to_shards)
    child.start()
    child.join()
    assert child.exitcode == 0


def _attach_to_shards() -> None:
    from torch.distributed import init_process_group
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = tiny_model("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    whole = experts.down_proj.detach().clone()
    init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    mesh = init_device_mesh("cpu", (2,))
    experts.down_proj = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    with pytest.raises(CarpoolError, match=r"layers\.1\.mlp: down_proj of its Qwen3MoeExperts is spread over 2"):
        attach(model)
    experts.down_proj = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(1)]))
    assert attach(model)  # plain tensor parallelism: each process has every expert's rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "xshare(budget=9)"}, "9 of 8 experts"),
        ({"plan": "nothing(1)"}, "unknown policy"),
        ({"plan": TIGHT, "group": "galaxy"}, "galaxy"),
        ({"plan": TIGHT, "group": "block:" + "9" * 5000}, "unknown grouping"),
        ({"plan": "sere(top=1)"}, "carpool calibrate"),
        ({"plan": "sere(top=1)", "stats": "/nowhere/stats.safetensors"}, "/nowhere/stats.safetensors"),
    ],
)
def test_bad_arguments(model: Any, options: dict[str, Any], message: str) -> None:
    plan = options.pop("plan")
    with pytest.raises(CarpoolError, match=message), carpool.share(model, plan, **options):
        pass
    assert not attach(model).open


def test_unknown_and_dense_models_are_refused_by_name() -> None:
    with pytest.raises(CarpoolError, match="Linear has no"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(CarpoolError, match="not str"):
        attach("model")
    switch = tiny_model("phimoe", num_local_experts=4)
    with pytest.raises(CarpoolError, match="PhimoeTopKRouter"):
        attach(switch)


def test_fingerprints_name_weights_not_dtypes(model: Any) -> None:
    name = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).bfloat16()) == name
    assert fingerprint(tiny_model("qwen3_moe", seed=1)) != name
