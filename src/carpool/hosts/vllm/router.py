"""The seam: a router of the target model gets, in place, a subclass of its class that passes through a policy.

Whatever vLLM asks of the router's type stays true, and nothing but the routing itself changes.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.hosts.engine import compiled, fused
from carpool.hosts.engine.layer import Layer
from carpool.hosts.vllm import supplement
from carpool.plans.counters import measured
from carpool.plans.pipeline import Outcome, route
from carpool.routing.spec import ALL_BITS, Routing

OP = "vllm_route"


def routed(layer: Layer, hidden_NH: Tensor, logits_NE: Tensor, native: Routing) -> Routing:
    """The routing of one call; the native one outside of a forward pass with rows to share. The layer's buffer, if it
    has one, says how deep its experts are read.

    Raises:
        CarpoolError: the router sees other rows than the engine's batch has, or what was left to surrogates by
            the call before was never added.
    """
    routing = _routing(layer, hidden_NH, logits_NE, native)
    if layer.depth_NK is not None:
        mine_NK = layer.depth_NK[: len(logits_NE)]
        mine_NK.fill_(ALL_BITS) if routing.depth_NK is None else mine_NK.copy_(routing.depth_NK)
    return routing


def _routing(layer: Layer, hidden_NH: Tensor, logits_NE: Tensor, native: Routing) -> Routing:
    layer.require_added()
    step = layer.step
    assert step is not None
    rows = step.rows
    expected = rows.expected or _rows_of_this_forward()
    if expected and len(logits_NE) != expected:
        raise CarpoolError(
            f"{layer.name}: the router sees {len(logits_NE)} rows of a forward pass of {expected} "
            "(sequence parallelism, micro-batches or gathered rows); this set-up is not supported"
        )
    if not (step.graphs or (step.enabled and rows.sharing >= layer.plan.least_voters)):
        return native
    if layer.fused is not None and step.observer is None:
        counted = fused.run(layer, hidden_NH, logits_NE, native, rows)
        if counted is not None:
            return _leaving(layer, counted)
    if layer.graph is not None and step.observer is None:
        done = compiled.run(layer.graph, layer, hidden_NH, logits_NE, native, rows)
        if done is not None:
            return _leaving(layer, _counted(layer, *done))
    batch = rows.batch(len(logits_NE))
    skipped_NK = native.ids_NK < 0  # some GPU kernels mark padding so; the experts module knows it
    valid = Routing(native.ids_NK.masked_fill(skipped_NK, 0), native.weights_NK)
    plan = layer.knobs.plan if step.graphs and layer.knobs is not None else layer.plan
    outcome = route(plan, layer.spec, logits_NE, batch, native=valid, stats=layer.stats, hidden_NH=hidden_NH)
    if step.observer is not None:
        step.observer(layer, logits_NE, outcome)
    return _leaving(
        layer, _counted(layer, _contiguous(outcome, native, skipped_NK), measured(batch, outcome, layer.deepest))
    )


def _rows_of_this_forward() -> int:
    """By the engine's own word where no batch runs (profiling, capture of a graph); 0 where it says nothing."""
    from vllm import forward_context

    if not forward_context.is_forward_context_available():
        return 0
    return getattr(forward_context.get_forward_context().batch_descriptor, "num_tokens", 0)


def _counted(layer: Layer, routing: Routing, values_F: Tensor) -> Routing:
    """The routing, counted. A recorded graph also runs where no row shares (warm-up, prompts, switched off), which
    does not count, and with rows of padding, which follow the first row so that they read no expert of their own.
    """
    step = layer.step
    assert step is not None
    if step.graphs:
        _, real_N, voter_N, *_ = step.rows.tensors(len(routing.ids_NK))
        shares = voter_N.any()
        values_F = values_F * shares
        follows_NK = (shares & ~real_N).unsqueeze(-1) & (routing.ids_NK >= 0)
        routing = replace(routing, ids_NK=torch.where(follows_NK, routing.ids_NK[:1], routing.ids_NK))
    step.counters.add_measured(layer.position, values_F)
    return routing


def _leaving(layer: Layer, routing: Routing) -> Routing:
    """The routing, with what it leaves to surrogates kept for the experts."""
    if routing.surrogate_ids_NK is not None and routing.surrogate_weights_NK is not None:
        layer.left = routing.surrogate_ids_NK, routing.surrogate_weights_NK
    return routing


def _contiguous(outcome: Outcome, native: Routing, skipped_NK: Tensor) -> Routing:
    """The CPU kernel ignores strides."""
    ids_NK = torch.where(skipped_NK, native.ids_NK, outcome.routing.ids_NK)
    return replace(outcome.routing, ids_NK=ids_NK.contiguous(), weights_NK=outcome.routing.weights_NK.contiguous())


@functools.cache
def shared_class(kind: Any) -> Any:
    """The subclass of a router class whose routing passes through its layer's plan.

    Single inheritance: an object's class can only be replaced by one of the same layout.
    """
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
    from vllm.platforms import current_platform

    class Shared(kind):
        carpool_layer: Layer | None = None  # None until the model is loaded and checked
        carpool_kind = kind.__name__

        @property
        def routing_method_type(self) -> Any:
            if current_platform.is_cpu():  # its kernels leave routing to Python, and some still ask for the method
                return super().routing_method_type
            return RoutingMethodType.Unspecified  # no fused routing kernel takes it, so Python routes

        @property
        def kernel_routing_method_type(self) -> Any:
            """vLLM 0.33 asks for this one."""
            return self.routing_method_type

        @property
        def supports_monolithic_kernels(self) -> bool:
            """vLLM 0.33 asks for it; on CPUs such kernels are refused by name once the model is loaded."""
            return bool(current_platform.is_cpu())

        def _compute_routing(self, hidden_states: Tensor, router_logits: Tensor, indices_type: Any,
                             *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
            layer = self.carpool_layer
            if layer is not None and torch.compiler.is_compiling():
                # the CPU build traces through the router; the policy must not be baked into the graph
                op = getattr(torch.ops.carpool, OP)
                return op(hidden_states, router_logits, kwargs.get("input_ids"), layer.name, self.top_k)
            weights_NK, ids_NK = super()._compute_routing(hidden_states, router_logits, indices_type, *args, **kwargs)
            if layer is None:
                return weights_NK, ids_NK
            shared = routed(layer, hidden_states, router_logits, Routing(ids_NK, weights_NK))
            return shared.weights_NK, shared.ids_NK

    Shared.__name__ = Shared.__qualname__ = f"Shared{kind.__name__}"
    return Shared


def is_shared(router: Any) -> bool:
    """Whether a router passes through Carpool."""
    return hasattr(type(router), "carpool_kind")


@functools.cache
def define_op() -> Any:
    """Register the operations that hide what we do from torch.compile; returns the library that owns them."""
    from vllm.utils.torch_utils import direct_register_custom_op

    library = torch.library.Library("carpool", "FRAGMENT")
    for name, run, fake in (
        (OP, _routed, _fake),
        (supplement.OP, supplement.supplemented, supplement.fake),
    ):
        direct_register_custom_op(name, run, mutates_args=[], fake_impl=fake, target_lib=library)
    return library


def _routed(
    hidden: torch.Tensor, logits: torch.Tensor, input_ids: torch.Tensor | None, layer_name: str, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    from vllm.forward_context import get_forward_context

    router = get_forward_context().no_compile_layers[layer_name].router
    weights_NK, ids_NK = router._compute_routing(hidden, logits, None, input_ids=input_ids)
    # an operation must not return a tensor that it was given
    return weights_NK.float().contiguous(), ids_NK.int().contiguous()


def _fake(
    hidden: torch.Tensor, logits: torch.Tensor, input_ids: torch.Tensor | None, layer_name: str, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)
