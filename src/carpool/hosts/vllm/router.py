"""The seam: a router of the target model gets, in place, a subclass of its class that passes through a policy.

Whatever vLLM asks of the router's type stays true, and nothing but the routing itself changes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.hosts.vllm import compiled, supplement
from carpool.hosts.vllm.knobs import Knobs
from carpool.hosts.vllm.step_rows import Rows
from carpool.plans.counters import Counters, measured
from carpool.plans.grammar import Plan
from carpool.plans.pipeline import Outcome, route
from carpool.routing.spec import RouteSpec, Routing

OP = "vllm_route"


@dataclass(eq=False)
class Step:
    """What all layers of an engine share while it runs.

    Attributes:
        rows: who the rows of the running forward pass are.
        counters: per-layer totals on the device.
        enabled: False switches every policy off.
        graphs: the engine records CUDA graphs, so that every call must run the same operations.
        observer: called with layer, logits and outcome of every routed call; None outside of tests and captures.
    """

    rows: Rows
    counters: Counters
    graphs: bool
    enabled: bool = True
    observer: Any = None


@dataclass(eq=False)
class Layer:
    """One MoE layer of one engine.

    Attributes:
        name: vLLM's name of the layer. index: its number in that name. position: its row in the counters.
        router: vLLM's router object. spec: how it routes. num_experts, hidden_size: `E` and `H`.
        runner: vLLM's object that runs router and experts.
        plan: policy and guards. statistics: the file's tensors of this layer. stats: what the policy made of them.
        knobs: the plan's numbers as device tensors.
        graph: the compiled form of this plan's kind; None where routing runs operation by operation.
        calls: times Python ran the router, for the proof that nothing bypasses it.
        resident: surrogates on the device, once a plan has asked for them.
        left: expert ids and weights of the pairs that the last call left to surrogates, until the experts run.
    """

    name: str
    index: int
    router: Any
    spec: RouteSpec
    plan: Plan
    num_experts: int
    hidden_size: int
    device: torch.device
    position: int = 0
    statistics: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, Tensor] = field(default_factory=dict)
    knobs: Knobs | None = None
    graph: compiled.Graph | None = None
    step: Step | None = None
    calls: int = 0
    runner: Any = None
    resident: supplement.Resident | None = None
    left: tuple[Tensor, Tensor] | None = None

    def route(self, hidden_NH: Tensor, logits_NE: Tensor, native: Routing) -> Routing:
        """The routing of one call; the native one outside of a forward pass with rows to share.

        Raises:
            CarpoolError: the router sees other rows than the engine's batch has, or what was left to surrogates by
                the call before was never added.
        """
        self.calls += 1
        self.require_added()
        step = self.step
        assert step is not None
        rows = step.rows
        if rows.expected and len(logits_NE) != rows.expected:
            raise CarpoolError(
                f"{self.name}: the router sees {len(logits_NE)} rows of a forward pass of {rows.expected} "
                "(sequence parallelism, micro-batches or gathered rows); this set-up is not supported"
            )
        if not (step.graphs or (step.enabled and rows.sharing >= self.plan.least_voters)):
            return native
        if self.graph is not None and step.observer is None:
            done = compiled.run(self.graph, self, hidden_NH, logits_NE, native, rows)
            if done is not None:
                return self._leaving(self._counted(*done))
        batch = rows.batch(len(logits_NE))
        skipped_NK = native.ids_NK < 0  # some GPU kernels mark padding so; the experts module knows it
        valid = Routing(native.ids_NK.masked_fill(skipped_NK, 0), native.weights_NK)
        plan = self.knobs.plan if step.graphs and self.knobs is not None else self.plan
        outcome = route(plan, self.spec, logits_NE, batch, native=valid, stats=self.stats, hidden_NH=hidden_NH)
        if step.observer is not None:
            step.observer(self, logits_NE, outcome)
        return self._leaving(self._counted(self._contiguous(outcome, native, skipped_NK), measured(batch, outcome)))

    def _counted(self, routing: Routing, values_F: Tensor) -> Routing:
        """The routing, counted. A recorded graph also runs where no row shares (warm-up, prompts, switched off), which
        does not count, and with rows of padding, which follow the first row so that they read no expert of their own.
        """
        step = self.step
        assert step is not None
        if step.graphs:
            _, real_N, voter_N, *_ = step.rows.tensors(len(routing.ids_NK))
            shares = voter_N.any()
            values_F = values_F * shares
            follows_NK = (shares & ~real_N).unsqueeze(-1) & (routing.ids_NK >= 0)
            routing = replace(routing, ids_NK=torch.where(follows_NK, routing.ids_NK[:1], routing.ids_NK))
        step.counters.add_measured(self.position, values_F)
        return routing

    def require_added(self) -> None:
        """Raises CarpoolError if pairs were left to surrogates and the experts ran without them."""
        if self.left is not None:
            raise CarpoolError(f"{self.name}: the engine bypassed its experts, so surrogates were not added; refused")

    def _leaving(self, routing: Routing) -> Routing:
        """The routing, with what it leaves to surrogates kept for the experts."""
        if routing.surrogate_ids_NK is not None and routing.surrogate_weights_NK is not None:
            self.left = routing.surrogate_ids_NK, routing.surrogate_weights_NK
        return routing

    @property
    def expert_bytes(self) -> int:
        """Of one expert's weights, on this rank."""
        experts = self.runner.routed_experts
        return int(sum(weight.nbytes for weight in experts.parameters()) // experts.local_num_experts)

    @property
    def surrogate_bytes(self) -> int:
        """Of one expert's surrogate, on this rank; 0 without any."""
        return 0 if self.resident is None else self.resident.bytes

    @staticmethod
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
            shared = layer.route(hidden_states, router_logits, Routing(ids_NK, weights_NK))
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
