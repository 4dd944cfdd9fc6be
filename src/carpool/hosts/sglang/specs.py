"""A RouteSpec from a `TopK` module of SGLang, and every one that has none."""

from __future__ import annotations

from typing import Any

from carpool.errors import CarpoolError
from carpool.routing.spec import RouteSpec

EPS = 1e-20  # SGLang's, in the sum that it divides by


def route_spec(config: Any, where: str) -> RouteSpec:
    """How a `TopK` routes.

    Args:
        config: its `TopKConfig`.
        where: the layer's name, for messages.

    Raises:
        CarpoolError: what does not rank experts by their logits alone, or what Carpool does not know.
    """
    from sglang.srt.layers.moe.topk import TopKOutputFormat

    function = config.custom_routing_function
    if function is not None:
        name = getattr(function, "__qualname__", type(function).__name__)
        raise CarpoolError(f"{where} uses a routing function of the model's own ({name}), which Carpool does not know")
    if config.num_shared_topk_slots or config.shared_experts.use_waterfill:
        raise CarpoolError(
            f"{where} appends fused shared experts to each row; start SGLang with --disable-shared-experts-fusion"
        )
    if config.output_format not in (None, TopKOutputFormat.STANDARD):
        raise CarpoolError(
            f"{where}: the experts' runner takes {config.output_format.name} and routes inside its kernels, past every "
            "policy; choose another with --moe-runner-backend, such as triton"
        )
    if config.sqrtsoftplus_log1p or config.fused_gate_packed_ids:
        raise CarpoolError(f"{where} is routed by a kernel of its own form, which Carpool does not know")
    bias_E = config.correction_bias
    grouped = bool(config.use_grouped_topk)
    scaling = config.routed_scaling_factor if config.apply_routed_scaling_factor_on_output else None
    rule: dict[str, Any] = {
        "top_k": config.top_k,
        # the grouped router with a correction bias uses sigmoid whatever is configured
        "scoring": "sigmoid" if grouped and bias_E is not None else config.scoring_func or "softmax",
        "renormalize": bool(config.renormalize),
        "renormalize_eps": EPS,
        "scaling": 1.0 if scaling is None else float(scaling),
        "bias_E": None if bias_E is None else bias_E.detach().float(),
    }
    if grouped:
        rule |= {"num_groups": config.num_expert_group, "kept_groups": config.topk_group}
        rule |= {"group_score": "max" if bias_E is None else "top2"}
    return RouteSpec(**rule)
