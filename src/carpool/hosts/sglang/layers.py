"""The MoE layers of a model that SGLang has loaded, checked: each with its rule, its plan and its statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.identity import Held, Sample, sample
from carpool.errors import CarpoolError
from carpool.hosts.engine.fitting import Gates, load_statistics, prepare
from carpool.hosts.engine.gate_check import check
from carpool.hosts.engine.layer import Experts, Layer
from carpool.hosts.engine.settings import Settings
from carpool.hosts.sglang.specs import route_spec
from carpool.routing.spec import RouteSpec, Routing

GATES = ("gate", "router")
PLAIN = "UnquantizedFusedMoEMethod"  # of SGLang, for weights as the checkpoint has them


@dataclass(frozen=True, eq=False)
class Found:
    """One MoE block of a model: its `TopK`, its experts and the weight of its gate."""

    name: str
    topk: Any
    experts: Any
    gate: Any


def build_layers(model: torch.nn.Module, settings: Settings, device: torch.device) -> list[Layer]:
    """Every MoE layer of the model.

    Args:
        model: the loaded target model.
        settings: the user's.
        device: of the model.

    Raises:
        CarpoolError: a dense model, a router that Carpool cannot share (the message names layer and cause), or a
            policy or statistics that do not fit the model.
    """
    found = find(model)
    if not found:
        raise CarpoolError(
            f"{type(model).__name__} has no mixture-of-experts layer that Carpool can share; start it without the key "
            "'carpool'"
        )
    layers = [_layer(one, settings, device) for one in found]
    for position, layer in enumerate(layers):
        layer.position = position
    statistics = load_statistics(settings.policies, layers, gates_of(layers))
    for layer in layers:
        layer.source = statistics
        layer.statistics = {} if statistics is None else statistics.for_layer(layer.index)
        layer.stats = prepare(layer, layer.plan)
    return layers


def find(model: torch.nn.Module) -> list[Found]:
    """The MoE blocks of a model.

    Raises:
        CarpoolError: experts without a `TopK` beside them, or one that is not followed.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.topk import TopK

    found = []
    for path, block in model.named_modules():
        experts = [child for child in block.children() if isinstance(child, FusedMoE)]
        if not experts:
            continue
        routers = [child for child in block.children() if isinstance(child, TopK)]
        if len(routers) != 1 or len(experts) != 1:
            kinds = sorted({type(child).__name__ for child in block.children()} - {"FusedMoE"})
            raise CarpoolError(
                f"{path} routes its experts without a TopK of SGLang's ({', '.join(kinds)}), past every policy"
            )
        if getattr(block, "use_block_routing", False):
            raise CarpoolError(
                f"{path} chooses experts for whole blocks by itself (expert_capacity), past every policy; such a model "
                "shares already"
            )
        gate = next((gate for name in GATES if (gate := getattr(block, name, None)) is not None), None)
        found.append(Found(path, routers[0], experts[0], gate))
    return found


def gates_of(layers: list[Layer]) -> Gates:
    """The gate's weight of every layer as it is now, by the layer's name; None where it cannot be read."""
    return {layer.name: _gate(layer.runner.gate, layer.num_experts) for layer in layers}


def _layer(found: Found, settings: Settings, device: torch.device) -> Layer:
    topk, experts, name = found.topk, found.experts, found.name
    num_experts = int(experts.num_global_routed_experts)
    hidden, dtype = int(experts.hidden_size), next(experts.parameters()).dtype
    dtype = dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16

    def native(logits_NE: Tensor) -> Routing:
        output = topk(torch.zeros(len(logits_NE), hidden, dtype=logits_NE.dtype, device=logits_NE.device), logits_NE)
        return Routing(output.topk_ids.int(), output.topk_weights)

    spec = _checked(
        route_spec(topk.topk_config, name), native, num_experts, _gate(found.gate, num_experts), dtype, device, name
    )
    return Layer(
        name=name,
        index=int(topk.layer_id),
        router=topk,
        spec=spec,
        plan=settings.plan_for(int(topk.layer_id)),
        num_experts=num_experts,
        hidden_size=hidden,
        device=device,
        runner=found,
        experts=Experts(
            bytes=sum(weight.nbytes for weight in experts.parameters()) // int(experts.num_local_experts),
            hidden_size=hidden,
        ),
        sample=partial(_sample, experts, int(topk.layer_id)),
    )


def _checked(
    spec: RouteSpec, native: Any, num_experts: int, gate_EH: Tensor | None, dtype: torch.dtype, device: torch.device,
    name: str,
) -> RouteSpec:  # fmt: skip
    """The rule, in the precision in which this SGLang scores: some of its routers do so in the logits' own."""
    try:
        check(spec, native, num_experts, gate_EH, dtype, device, name)
    except CarpoolError:
        other = replace(spec, score_in_logits_dtype=True)
        try:
            check(other, native, num_experts, gate_EH, dtype, device, name)
        except CarpoolError:
            pass
        else:
            return other
        raise
    return spec


def _gate(gate: Any, num_experts: int) -> Tensor | None:
    weight = getattr(gate, "weight", None)
    return weight.detach() if isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == num_experts else None


def _sample(experts: Any, index: int) -> Sample:
    """Of the experts' weights as they lie in memory, where that is as the checkpoint has them."""
    method = type(experts.quant_method).__name__
    into_ERH, out_EHI = (getattr(experts, name, None) for name in ("w13_weight", "w2_weight"))
    columns, hidden = int(experts.intermediate_size_per_partition), int(experts.hidden_size)
    if not isinstance(into_ERH, Tensor) or not isinstance(out_EHI, Tensor):
        return Sample(hidden=f"weights as {method} packs them")
    if method != PLAIN or out_EHI.shape[1:] != (hidden, columns) or into_ERH.shape[1:] != (2 * columns, hidden):
        return Sample(hidden=f"weights as {method} packs them")
    width = columns * int(experts.moe_tp_size)
    held = Held(
        into_ERH, out_EHI, width, first=int(experts.moe_tp_rank) * columns, places=torch.arange(len(out_EHI)),
        hidden_size=hidden,
    )  # fmt: skip
    return sample(index, held)
