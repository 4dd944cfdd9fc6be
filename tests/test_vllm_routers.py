"""Routers of vLLM: which are refused, by whose rule the others are shared, and what their making leaves alone."""

from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_models as tiny

from carpool import CarpoolError, RouteSpec
from carpool.hosts.engine.gate_check import check
from carpool.hosts.vllm.specs import route_spec

tiny.set_environment()
pytest.importorskip("vllm", reason="vLLM is an extra")
SHARING = {"policy": "xshare(budget=8)", "isolation": "batch"}


def router(**changes: Any) -> Any:
    base: dict[str, Any] = {
        "top_k": 4, "scoring_func": "softmax", "renormalize": True, "use_grouped_topk": False, "num_expert_group": None,
        "topk_group": None, "routed_scaling_factor": 1.0, "e_score_correction_bias": None,
        "custom_routing_function": None, "_hash_indices_table": None,
    }  # fmt: skip
    return SimpleNamespace(**(base | changes))


def _external(**_: Any) -> None: ...


_external.__module__ = "vllm.model_executor.models.transformers.moe"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"_hash_indices_table": torch.zeros(1)}, "CPURouter", "hash-routed"),
        ({"custom_routing_function": lambda: None}, "CPURouter", "routing function of the model's own"),
        ({"custom_routing_function": partial(_external)}, "CPURouter", "external routing"),
        ({"e_score_correction_bias": torch.zeros(8)}, "CPURouter", "does not apply the correction bias"),
        ({"scoring_func": "sigmoid"}, "CPURouter", "sigmoid scores without expert groups"),
        ({"routed_scaling_factor": 2.5}, "CPURouter", "scaling factor 2.5"),
        ({"num_fused_shared_experts": 1}, "FusedTopKRouter", "fused shared experts"),
        ({"bias_vl": torch.zeros(8)}, "FusedTopKBiasRouter", "image tokens"),
        ({}, "ZeroExpertRouter", "ZeroExpertRouter"),
        ({}, "RoutingSimulatorRouter", "RoutingSimulatorRouter"),
    ],
)
def test_refused_routers(changes: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(CarpoolError, match=r"layers\.3\.mlp") as caught:
        route_spec(router(**changes), kind, "layers.3.mlp")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"renormalize": False},
        {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2},
        {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2, "scoring_func": "sigmoid",
         "routed_scaling_factor": 2.5, "e_score_correction_bias": torch.linspace(0, 1, 32)},
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_is_the_routers(changes: dict[str, Any], dtype: torch.dtype) -> None:
    """vLLM's own CPU router conforms to the rule read from it, and to no other."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    from carpool import Routing

    given = {k.lstrip("_"): v for k, v in vars(router(**changes)).items()}
    real = CPURouter(global_num_experts=32, **given)
    spec = route_spec(real, "CPURouter", "layer")

    def native(logits_NE: torch.Tensor) -> Routing:
        weights_NK, ids_NK = real._compute_routing(logits_NE, logits_NE, None)
        return Routing(ids_NK, weights_NK)

    where = (32, torch.randn(32, 16), dtype, torch.device("cpu"), "layer 7")
    check(spec, native, *where)
    wrong = RouteSpec(**(vars(spec) | {"renormalize": not spec.renormalize}))
    with pytest.raises(CarpoolError, match="layer 7: the router weighs"):
        check(wrong, native, *where)
    with pytest.raises(CarpoolError, match="layer 7: the router picks other experts"):
        check(RouteSpec(**(vars(spec) | {"bias_E": torch.linspace(1, 0, 32)})), native, *where)


def test_the_kill_switch_arms_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    from carpool.hosts.vllm import register

    monkeypatch.setattr(WorkerBase, "__init__", getattr(WorkerBase.__init__, "carpool_original", WorkerBase.__init__))
    monkeypatch.setenv("CARPOOL_DISABLE", "1")
    register()
    assert not hasattr(WorkerBase.__init__, "carpool_original")
    monkeypatch.setenv("CARPOOL_DISABLE", "0")
    register()
    assert hasattr(WorkerBase.__init__, "carpool_original")


def test_a_vllm_that_moved_a_constructor_runs_until_it_is_asked_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    from carpool.hosts.vllm import arm, register

    monkeypatch.setattr(arm, "_missing", [])
    monkeypatch.setattr(arm, "PLACES", (*arm.PLACES, ("vllm.v1.worker.moved", "Worker", "__init__", lambda *_: None)))
    register()
    arm._configured(None, SimpleNamespace(additional_config={}))
    with pytest.raises(CarpoolError, match=r"this vLLM has no vllm\.v1\.worker\.moved\.Worker"):
        arm._configured(None, SimpleNamespace(additional_config={"carpool": SHARING}))


def test_policies_see_experts_and_not_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under EPLB vLLM maps ids to copies after the seam: what is shared are experts as the model numbers them."""
    from vllm.distributed.eplb.eplb_state import EplbLayerState
    from vllm.model_executor.layers.fused_moe.router import base_router
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    from carpool.hosts.vllm import router as seam

    one = torch.ones(1, dtype=torch.int32)
    state = EplbLayerState(one, one, one, one, [one])
    router = CPURouter(top_k=2, global_num_experts=8, eplb_state=state, renormalize=True)
    router.__class__ = seam.shared_class(CPURouter)
    layer, seen = SimpleNamespace(), []
    router.carpool_layer = layer

    def routed(given: Any, hidden_NH: Any, logits_NE: Any, native: Any) -> Any:
        assert given is layer
        seen.append(native.ids_NK)
        return native

    monkeypatch.setattr(seam, "routed", routed)
    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", lambda topk_ids, **_: topk_ids + 100)
    logits_NE = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    _, ids_NK = router.select_experts(torch.zeros(5, 4), logits_NE)
    assert torch.equal(seen[0].sort(-1).values, logits_NE.topk(2).indices.int().sort(-1).values)
    assert torch.equal(ids_NK, seen[0] + 100)


def test_routers_are_made_without_a_word_about_the_weights() -> None:
    """So the seam is the same whatever the format of the experts; engines: `test_vllm_families.py`."""
    from vllm.model_executor.layers.fused_moe.layer import create_fused_moe_router

    names = inspect.signature(create_fused_moe_router).parameters
    assert "top_k" in names
    assert not [name for name in names if "quant" in name or "weight_dtype" in name or "params_dtype" in name]
