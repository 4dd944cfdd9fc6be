"""The seam: a router of the target model gets, in place, a subclass of its class that passes through a policy.

Whatever vLLM asks of the router's type stays true, and nothing but the routing itself changes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from carpool.hosts.engine.layer import Layer
from carpool.hosts.engine.routed import routed
from carpool.hosts.vllm import supplement
from carpool.routing.spec import Routing

OP = "vllm_route"


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


def rows_of_this_forward() -> int:
    """By the engine's own word where no batch runs (profiling, capture of a graph); 0 where it says nothing."""
    from vllm import forward_context

    if not forward_context.is_forward_context_available():
        return 0
    return getattr(forward_context.get_forward_context().batch_descriptor, "num_tokens", 0)
