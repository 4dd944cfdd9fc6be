"""The MoE layers of a loaded model, checked: each with its routing rule, its plan and its statistics."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.hosts.engine.fitting import Gates, load_statistics, prepare
from carpool.hosts.engine.gate_check import check
from carpool.hosts.engine.layer import Experts, Layer
from carpool.hosts.engine.settings import Settings
from carpool.hosts.vllm.early import require_experts
from carpool.hosts.vllm.expert_samples import taken
from carpool.hosts.vllm.planes import planes_file, stored_depths
from carpool.hosts.vllm.router import is_shared
from carpool.hosts.vllm.specs import route_spec
from carpool.hosts.vllm.supplement import resident
from carpool.hosts.vllm.unwrapped import require_all
from carpool.routing.spec import Routing

GATES = ("gate", "router")


def build_layers(model: torch.nn.Module, settings: Settings, config: Any, device: torch.device) -> list[Layer]:
    """Every MoE layer of the model.

    Args:
        model: the loaded target model.
        settings: the user's.
        config: vLLM's configuration.
        device: of the model.

    Raises:
        CarpoolError: a dense model, a router that Carpool cannot share (the message names layer and cause), or a
            policy or statistics that do not fit the model.
    """
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    modules = dict(model.named_modules())
    found = [(path, module) for path, module in modules.items() if isinstance(module, MoERunner)]
    require_experts(bool(found) or config.parallel_config.pipeline_parallel_size > 1, type(model).__name__)
    require_all(model, [runner for _, runner in found])
    gates = {runner.layer_name: _gate(modules, path, runner) for path, runner in found}
    layers = [_layer(runner, gates[runner.layer_name], settings, device) for _, runner in found]
    for position, layer in enumerate(layers):
        layer.position = position
    own = planes_file(config.model_config)
    statistics = load_statistics(settings.policies, layers, gates, own)
    for layer in layers:
        layer.source = statistics
        layer.statistics = {} if statistics is None else statistics.for_layer(layer.index)
        layer.stats = prepare(layer, layer.plan)
    return layers


def gates_of(model: torch.nn.Module, layers: list[Layer]) -> Gates:
    """The gate's weight of every layer as it is now, by the layer's name; None where it cannot be read."""
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    return {layer.name: _gate(modules, paths[id(layer.runner)], layer.runner) for layer in layers}


def _layer(runner: Any, gate_EH: Tensor | None, settings: Settings, device: torch.device) -> Layer:
    from vllm.model_executor.models.utils import extract_layer_index

    name, router, moe = runner.layer_name, runner.router, runner.moe_config
    if not is_shared(router):
        raise CarpoolError(f"{name} brings a {type(router).__name__} of its own, which Carpool cannot share")
    if runner.is_monolithic:
        method = type(runner.routed_experts.quant_method).__name__
        raise CarpoolError(f"{name}: {method} routes inside its kernel and has no other form here; no policy can run")
    if getattr(runner.routed_experts, "expert_substitution", None) is not None:
        raise CarpoolError(
            f"{name}: constants stand in for some of its experts (expert substitution), which cost nothing to read, "
            "but every policy would count and choose them as experts; not supported yet"
        )
    spec = route_spec(router, router.carpool_kind, name)
    num_experts = moe.num_logical_experts
    dtype = moe.router_logits_dtype or moe.in_dtype

    def native(logits_NE: Tensor) -> Routing:
        hidden_NH = torch.zeros(len(logits_NE), moe.hidden_dim, dtype=moe.in_dtype, device=logits_NE.device)
        weights_NK, ids_NK = router._compute_routing(hidden_NH, logits_NE, None)
        return Routing(ids_NK, weights_NK)

    check(spec, native, num_experts, gate_EH, dtype, device, name)
    index, experts = extract_layer_index(name), runner.routed_experts
    return Layer(
        name=name,
        index=index,
        router=router,
        spec=spec,
        plan=settings.plan_for(index),
        num_experts=num_experts,
        hidden_size=moe.hidden_dim,
        device=device,
        runner=runner,
        experts=_experts(runner),
        sample=partial(taken, experts),
        stand_ins=resident,
    )


def _experts(runner: Any) -> Experts:
    moe, experts, depths = runner.moe_config, runner.routed_experts, stored_depths(runner)
    method = experts.quant_method
    whole = sum(weight.nbytes for weight in experts.parameters()) // experts.local_num_experts
    return Experts(
        bytes=int(method.expert_bytes if depths else whole),
        hidden_size=moe.hidden_dim_unpadded,
        depths=depths,
        bit_bytes=int(method.bit_bytes) if depths else 0,
        replicas=int(moe.num_experts - moe.num_logical_experts),
    )


def _gate(modules: dict[str, torch.nn.Module], path: str, runner: Any) -> Tensor | None:
    """The gate's weight `[E, H]`, or None where it cannot be read.

    The CPU build packs weights for its kernels and drops the original; what the gate makes of unit vectors is the
    weight again, bit for bit, as long as it adds no bias.
    """
    block = modules.get(path.removesuffix(".base_layer").rpartition(".")[0])  # adapters wrap the layer
    gates = [runner.gate, *(getattr(block, name, None) for name in GATES)]
    for gate in gates:
        weight = getattr(gate, "weight", None)
        if weight is None:
            continue
        if weight.dim() == 2 and weight.shape[0] == runner.moe_config.num_logical_experts:
            return weight.detach()
        if getattr(gate, "bias", None) is None and weight.is_floating_point():
            hidden = runner.moe_config.hidden_dim
            output = gate(torch.eye(hidden, dtype=runner.moe_config.in_dtype, device=weight.device))
            columns_HE = output[0] if isinstance(output, tuple) else output
            return columns_HE.detach().T
    return None
