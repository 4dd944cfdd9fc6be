"""The MoE layers of a loaded model, checked: each with its routing rule, its plan and its statistics."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.identity import Identity, fingerprint
from carpool.artefacts.statistics import Statistics
from carpool.errors import CarpoolError
from carpool.experts.stored import NAMES
from carpool.hosts.engine.gate_check import check
from carpool.hosts.engine.layer import Layer
from carpool.hosts.engine.settings import Settings
from carpool.hosts.vllm.early import check_fit, require_experts
from carpool.hosts.vllm.expert_samples import taken
from carpool.hosts.vllm.planes import planes_file, stored_depths
from carpool.hosts.vllm.router import is_shared
from carpool.hosts.vllm.specs import route_spec
from carpool.hosts.vllm.supplement import resident
from carpool.hosts.vllm.unwrapped import require_all
from carpool.plans.grammar import Plan
from carpool.plans.pipeline import route
from carpool.plans.policy_file import PolicyFile
from carpool.routing.batch import Batch
from carpool.routing.spec import Routing

GATES = ("gate", "router")
REHEARSED = 8  # rows


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


def prepare(layer: Layer, plan: Plan) -> dict[str, Tensor]:
    """What a plan needs of the layer's statistics, on the layer's device; checks the plan too.

    Raises:
        CarpoolError: the plan does not fit the layer, or needs statistics that were not loaded or facts that an
            engine does not give.
    """
    check_fit(plan, layer.num_experts, layer.spec.top_k, layer.statistics, bool(stored_depths(layer.runner)))
    stats = {name: tensor.to(layer.device) for name, tensor in plan.policy.prepare(layer.statistics).items()}
    _rehearse(layer, plan, stats)
    if plan.policy.surrogates and layer.resident is None:
        layer.resident = resident(layer)
    return stats


def _rehearse(layer: Layer, plan: Plan, stats: dict[str, Tensor]) -> None:
    """Run the plan once on made-up rows: what it cannot do here it must not find out while serving."""
    logits_NE = torch.randn(REHEARSED, layer.num_experts, generator=torch.Generator().manual_seed(0)).to(layer.device)
    request_N = torch.arange(REHEARSED, device=layer.device) // 2
    batch = Batch.of(REHEARSED, device=layer.device, request_N=request_N, num_requests=REHEARSED)
    hidden_NH = torch.zeros(REHEARSED, layer.hidden_size, device=layer.device)
    route(plan, layer.spec, logits_NE, batch, stats=stats, hidden_NH=hidden_NH)


def load_statistics(
    policies: PolicyFile, layers: list[Layer], gates: dict[str, Tensor | None], own: Path | None = None
) -> Statistics | None:
    """The statistics file, if the settings name one or the checkpoint brings its own, and it is of this model.

    Args:
        own: the checkpoint's own file of experts in planes, with what policies need to know of them.

    Raises:
        CarpoolError: unreadable, damaged or of another model; or a policy file of another model or other layers.
    """
    policies.check_layers([layer.index for layer in layers])
    source = policies.statistics or own
    if source is None and not policies.model:
        return None
    # planes are left to the experts, which read them themselves
    statistics = None if source is None else Statistics.load(source, leave=NAMES)
    caveat = _check_model(policies, statistics, layers, gates)
    if caveat and source != own:  # what the checkpoint brings was made with its experts
        logging.getLogger("vllm.carpool").warning(caveat)
    return statistics


def differ(model: torch.nn.Module, policies: PolicyFile, layers: list[Layer]) -> str:
    """Why the files do not describe the weights that the model has now, after others were loaded into it; empty if they
    do. What cannot be compared does not count as the same, as it does in an engine that starts with it."""
    if not policies.model and layers[0].source is None:
        return ""
    try:
        return _check_model(policies, layers[0].source, layers, gates_of(model, layers))
    except CarpoolError as error:
        return str(error)


def gates_of(model: torch.nn.Module, layers: list[Layer]) -> dict[str, Tensor | None]:
    """The gate's weight of every layer as it is now, by the layer's name; None where it cannot be read."""
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    return {layer.name: _gate(modules, paths[id(layer.runner)], layer.runner) for layer in layers}


def _check_model(
    policies: PolicyFile, statistics: Statistics | None, layers: list[Layer], gates: dict[str, Tensor | None]
) -> str:
    """What could not be compared; raises CarpoolError for files of another model."""
    weights = [(layer.index, gate) for layer in layers if (gate := gates[layer.name]) is not None]
    if len(weights) < len(layers):
        raise CarpoolError("the gates of this model cannot be read, so statistics and policy files cannot be checked")
    first = layers[0]
    mine = Identity(
        fingerprint=fingerprint(weights),
        layers=tuple(layer.index for layer in layers),
        num_experts=first.num_experts,
        top_k=first.spec.top_k,
        hidden_size=first.runner.moe_config.hidden_dim_unpadded,
        samples={layer.index: taken(layer.runner.routed_experts) for layer in layers},
    )
    policies.check_model(mine)
    return "" if statistics is None else statistics.check(mine)


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
    index = extract_layer_index(name)
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
