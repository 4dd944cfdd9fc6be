"""Beside the experts: what surrogates give is added to the output of the fused kernel of routed experts.

There the output is a part of a sum in every respect: shared experts, a scaling factor after the experts, an output
transform and the sum over ranks all come later, for experts and surrogates alike. So each rank of tensor parallelism
adds its part of the surrogates, and the whole is added once.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.experts.surrogates import Surrogates
from carpool.hosts.engine.layer import Layer
from carpool.hosts.engine.resident import Resident

OP = "vllm_surrogates"
PARAMETERS = ("x", "topk_weights", "topk_ids")  # of the method that runs the experts


def resident(layer: Layer) -> Resident:
    """The layer's surrogates from its statistics, checked, on this rank.

    Raises:
        CarpoolError: they do not fit the layer, or its experts do not return a plain sum that more could be added to.
    """
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    runner, found = layer.runner, Surrogates.of(layer.statistics)
    experts, width = found.bias_EH.shape
    if (experts, width) != (layer.num_experts, layer.hidden_size):
        raise CarpoolError(
            f"{layer.name}: surrogates of {experts} experts of width {width}, but the kernel runs {layer.num_experts} "
            f"of width {layer.hidden_size} (padded or foreign weights); use another policy here"
        )
    moe, world = runner.moe_config, get_tensor_model_parallel_world_size()
    summed = moe.tp_size > 1 or moe.ep_size > 1  # else every rank holds all of every expert
    for holds, cause in (
        (runner.routed_experts.apply_router_weight_on_input, "weighs inputs, not outputs, so they are no plain sum"),
        (moe.is_lora_enabled, "may carry adapters, and surrogates foresee the experts without them"),
        (moe.is_sequence_parallel, "splits its rows over ranks (sequence parallelism)"),
        (summed and runner._fused_output_is_reduced, "has a kernel that sums over ranks by itself"),
    ):
        if holds:
            raise CarpoolError(f"{layer.name} {cause}: surrogates' output cannot be added; use another policy here")
    rank, parts = (get_tensor_model_parallel_rank(), world) if summed else (0, 1)
    return Resident(layer.statistics, rank, parts, layer.device)


def hook(layer: Layer) -> None:
    """Let the layer's experts pass through `supplement`, in place, by a subclass of their class.

    Raises:
        CarpoolError: experts of a vLLM that calls them otherwise.
    """
    experts = layer.runner.routed_experts
    kind: Any = type(experts)
    if not hasattr(kind, "carpool_kind"):
        experts.__class__ = _supplemented_class(kind)
    experts.carpool_layer = layer


@functools.cache
def _supplemented_class(kind: Any) -> Any:
    parameters = inspect.signature(getattr(kind, "forward_modular", lambda: None)).parameters
    missing = [name for name in PARAMETERS if name not in parameters]
    if missing:
        raise CarpoolError(f"{kind.__name__} of this vLLM takes no {missing[0]!r}; surrogates are not supported there")

    class Supplemented(kind):
        carpool_layer: Layer | None = None
        carpool_kind = kind.__name__

        def forward_modular(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor,
                            *args: Any, **kwargs: Any) -> Any:  # fmt: skip
            layer = self.carpool_layer
            added = None
            if layer is not None and torch.compiler.is_compiling():
                # opaque, like the router's operation, which the ids keep before it
                added = getattr(torch.ops.carpool, OP)(x, topk_ids, layer.name)
            elif layer is not None:
                added = supplement(layer, x)  # before the experts: some kernels write over their input
            output = super().forward_modular(x, topk_weights, topk_ids, *args, **kwargs)
            if added is None:
                return output
            if not isinstance(output, Tensor) or output.shape != added.shape:
                raise CarpoolError(f"{self.layer_name}: the kernel returns no sum a row to which surrogates could add")
            return output + added.to(output.dtype)

    Supplemented.__name__ = Supplemented.__qualname__ = f"Supplemented{kind.__name__}"
    return Supplemented


def supplement(layer: Layer, hidden_NH: Tensor) -> Tensor | None:
    """What surrogates give for the pairs that the last routing left to them, `[N, H]`; None where it left none.

    Where nothing is recorded only rows that share are computed: prompt rows leave nothing.
    """
    left, layer.left = layer.left, None
    if left is None:
        return None
    assert layer.resident is not None
    assert layer.step is not None
    places_M = None if layer.step.graphs else layer.step.rows.sharing_rows()
    if places_M is None:
        return layer.resident(hidden_NH, *left)
    ids_MK, weights_MK = (part[places_M] for part in left)
    added_NH = torch.zeros(hidden_NH.shape, device=hidden_NH.device)
    return added_NH.index_copy(0, places_M, layer.resident(hidden_NH[places_M], ids_MK, weights_MK))


def supplemented(hidden: torch.Tensor, ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    """The operation that torch.compile sees."""
    from vllm.forward_context import get_forward_context

    layer = get_forward_context().no_compile_layers[layer_name].routed_experts.carpool_layer
    added = supplement(layer, hidden)
    return torch.zeros_like(hidden) if added is None else added.to(hidden.dtype)


def fake(hidden: torch.Tensor, ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    """Its shape."""
    return torch.empty_like(hidden)
