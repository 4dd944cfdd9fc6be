"""A RouteSpec from a router object of vLLM, and every router that has none."""

from __future__ import annotations

from typing import Any

from carpool.errors import CarpoolError
from carpool.routing.spec import RouteSpec

EXTERNAL = "vllm.model_executor.models.transformers"  # the Transformers backend's routers only pass ids through


def route_spec(router: Any, kind: str, where: str) -> RouteSpec:
    """How a router routes.

    Args:
        router: the router object of a loaded model.
        kind: name of vLLM's own class of it.
        where: the layer's name, for messages.

    Raises:
        CarpoolError: a router that does not rank experts by their logits alone, one that Carpool does not know, or
            one whose form for the CPU leaves out a part of the model's rule.
    """
    _refuse_special(router, where)
    scoring, renormalize = getattr(router, "scoring_func", "softmax"), bool(getattr(router, "renormalize", True))
    bias_E = getattr(router, "e_score_correction_bias", None)
    scaling = float(getattr(router, "routed_scaling_factor", 1.0))
    rule = {"top_k": router.top_k, "scoring": scoring, "renormalize": renormalize}
    grouped = kind == "GroupedTopKRouter" or getattr(router, "use_grouped_topk", False)
    if kind == "CPURouter" and not grouped and scoring != "sqrtsoftplus":
        _refuse_cpu_gaps(scoring, bias_E, scaling, where)
        return RouteSpec(**rule)
    if kind == "FusedTopKRouter":
        return RouteSpec(**rule)
    if kind not in ("CPURouter", "GroupedTopKRouter", "FusedTopKBiasRouter"):
        raise CarpoolError(f"{where} is routed by a {kind}, which Carpool does not know; its policies cannot run there")
    rule |= {"scaling": scaling, "bias_E": None if bias_E is None else bias_E.detach().float()}
    if grouped:
        rule |= {"num_groups": router.num_expert_group, "kept_groups": router.topk_group}
        rule |= {"group_score": "max" if bias_E is None else "top2"}
    return RouteSpec(**rule)


def _refuse_special(router: Any, where: str) -> None:
    if getattr(router, "_hash_indices_table", None) is not None:
        raise CarpoolError(f"{where} is hash-routed: token ids, not scores, choose its experts; it cannot be shared")
    if getattr(router, "bias_vl", None) is not None:
        raise CarpoolError(f"{where} routes image tokens by another bias, which Carpool does not model yet")
    if getattr(router, "num_fused_shared_experts", 0):
        raise CarpoolError(f"{where} appends fused shared experts to each row; turn their fusion off")
    function = getattr(router, "custom_routing_function", None)
    function = getattr(function, "func", function)  # of a functools.partial
    if function is None:
        return
    if str(getattr(function, "__module__", "")).startswith(EXTERNAL):
        raise CarpoolError(
            f"{where} is routed outside of vLLM (Transformers backend, external routing): there are no router logits "
            "to share by; use a model that vLLM implements itself"
        )
    name = getattr(function, "__qualname__", type(function).__name__)
    raise CarpoolError(f"{where} uses a routing function of the model's own ({name}), which Carpool does not know")


def _refuse_cpu_gaps(scoring: str, bias_E: Any, scaling: float, where: str) -> None:
    """vLLM's CPU router knows plain softmax only; what else the model asks for it drops without a word."""
    gap = ""
    if scoring != "softmax":
        gap = f"{scoring} scores without expert groups"
    elif bias_E is not None:
        gap = "the correction bias of a softmax router"
    elif scaling != 1.0:
        gap = f"the scaling factor {scaling:g} of a router without expert groups"
    if gap:
        raise CarpoolError(
            f"{where}: vLLM's CPU build does not apply {gap}, so it does not run this model as published; "
            "Carpool does not share experts on top of that"
        )
