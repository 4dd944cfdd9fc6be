"""vLLM and transformers route the same logits the same way, by themselves and under policies. No engine is started.

Routers are transformers' own, of tiny models, and vLLM's own, with the arguments that its models give them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vllm_models
from tiny_models import tiny_model
from torch import Tensor, nn

from carpool import Batch, Routing, parse, route
from carpool.hosts.transformers import find_layers

vllm_models.set_environment()
pytest.importorskip("vllm", reason="vLLM is an extra")
EXPERTS, ROWS = 8, 40
POLICIES = (
    "xshare(budget=3, warmup=0)", "xshare(budget=4) | floor(0.3)", "oea(k0=1)", "des_vote(size=3)", "lynx(budget=3)",
    "topk(k=1)", "top_p(p=0.6)", "xshare(budget=8)", "xshare(budget=3, warmup=0) | regret(0.1)",
)  # fmt: skip


def softmax(config: Any, router: nn.Module) -> dict[str, Any]:
    return {"renormalize": getattr(config, "norm_topk_prob", True)}


def grouped(config: Any, router: nn.Module) -> dict[str, Any]:
    sigmoid = hasattr(router, "e_score_correction_bias")
    return {
        "renormalize": config.norm_topk_prob,
        "use_grouped_topk": True,
        "num_expert_group": config.n_group,
        "topk_group": config.topk_group,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "routed_scaling_factor": config.routed_scaling_factor,
        "e_score_correction_bias": router.e_score_correction_bias if sigmoid else None,
    }


FAMILIES = {
    "qwen3_moe": softmax, "qwen2_moe": softmax, "mixtral": softmax, "olmoe": softmax, "gpt_oss": softmax,
    "granitemoe": softmax, "deepseek_v2": grouped, "deepseek_v3": grouped, "glm4_moe": grouped,
}  # fmt: skip


def dense(routing: Routing) -> Tensor:
    """Each row's weight for each expert, whatever the order of its slots."""
    weights_NK = routing.weights_NK.float()
    return torch.zeros(len(weights_NK), EXPERTS).scatter_add(-1, routing.ids_NK.long(), weights_NK)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_same_experts_for_the_same_logits(family: str) -> None:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    from carpool.hosts.vllm.specs import route_spec

    changes = {"norm_topk_prob": False} if family == "deepseek_v2" else {}
    model = tiny_model(family, **changes)
    layer = find_layers(model)[0]
    hidden_NH = torch.randn(ROWS, layer.weight_EH.shape[1], generator=torch.Generator().manual_seed(0))
    logits_NE, mine = layer.routed(layer.router(hidden_NH))
    given = FAMILIES[family](model.config, layer.router)
    router = CPURouter(global_num_experts=EXPERTS, top_k=layer.top_k, **given)
    weights_NK, ids_NK = router._compute_routing(hidden_NH, logits_NE, None)
    theirs, spec = Routing(ids_NK, weights_NK), route_spec(router, "CPURouter", "layer")
    torch.testing.assert_close(dense(theirs), dense(mine), rtol=1e-5, atol=1e-6)
    # what both hosts take the rule to be, beside what the routers do
    torch.testing.assert_close(dense(spec.native(logits_NE)), dense(layer.spec.native(logits_NE)), rtol=1e-5, atol=1e-6)
    batch = Batch.of(ROWS, group_N=torch.arange(ROWS) % 5, num_groups=5)
    changed = 0
    for text in POLICIES:
        here = route(parse(text), layer.spec, logits_NE, batch, native=mine)
        there = route(parse(text), spec, logits_NE, batch, native=theirs)
        assert torch.equal(here.coreset_GE, there.coreset_GE), text
        assert torch.equal(here.changed_N, there.changed_N), text
        assert torch.equal(here.computed_NE, there.computed_NE), text
        torch.testing.assert_close(dense(here.routing), dense(there.routing), rtol=1e-5, atol=1e-6, msg=text)
        changed += int(here.changed_N.sum())
    assert changed > ROWS
