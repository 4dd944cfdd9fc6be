"""Checkpoints whose experts are planes of bits (`carpool compress --output`): how vLLM loads and computes them.

To vLLM it is a quantisation method like its own, which only the experts take; all else stays as it is. A plan that
reads depths writes them into the layer's buffer while it routes, and the experts read them there.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.checkpoint import METHOD, planes_in, planes_settings
from carpool.artefacts.model_source import folder_of
from carpool.artefacts.statistics import Statistics
from carpool.errors import CarpoolError
from carpool.experts.stored import SHAPE, StoredExperts
from carpool.kernels.experts.activation import Activation
from carpool.kernels.experts.operation import reader
from carpool.routing.spec import ALL_BITS

OP = "vllm_read_experts"
ALPHA, LIMIT = 1.702, 7.0  # of GPT-OSS, where the model does not say


def planes_file(model_config: Any) -> Path | None:
    """The file with the experts of a checkpoint in planes, by vLLM's configuration of the model; None for others.

    Raises:
        CarpoolError: they are planes, and the file is missing.
    """
    config = getattr(model_config, "hf_config", None)
    if planes_settings(config) is None:
        return None
    return planes_in(config, folder_of(model_config.model) or Path(model_config.model))


def register_method() -> None:
    """Make the method known to vLLM, in every process that it starts."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from carpool.hosts.vllm.planes_config import PlanesConfig

    register_quantization_config(METHOD)(PlanesConfig)


def stored_depths(runner: Any) -> tuple[int, ...]:
    """The depths at which a layer's experts can be read; none where they are no planes."""
    method = getattr(getattr(runner, "routed_experts", None), "quant_method", None)
    depths: tuple[int, ...] = getattr(method, "carpool_depths", ())
    return depths


def new_buffer(max_rows: int, top_k: int, device: torch.device) -> Tensor:
    """Where a layer's depths travel from its router to its experts, int32 `[rows, K]`: all that is stored, to begin."""
    return torch.full((max_rows, top_k), ALL_BITS, dtype=torch.int32, device=device)


@functools.cache
def method_class() -> Any:
    """vLLM's method for a layer's experts in planes."""
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    class PlanesMethod(FusedMoEMethodBase):
        """The experts of one layer.

        Attributes:
            carpool_depths: offered depths.
            read: see `carpool.kernels.experts.operation.reader`; None until the weights are loaded.
            buffer: depths of the running call (see `new_buffer`); None without a policy.
            expert_bytes: of an expert on this rank, read as deep as it is stored. bit_bytes: of one bit of its weights.
        """

        def __init__(self, moe: Any, path: Path, index: int, device: torch.device) -> None:
            super().__init__(moe)
            _require_plain(moe)
            self._path, self._index, self._device = path, index, device
            self.carpool_depths = StoredExperts.depths_in(Statistics.tensors_of(path, index, (SHAPE,)))
            self.read: Any = None
            self.buffer: Tensor | None = None
            self.expert_bytes = self.bit_bytes = 0
            _define_op()

        def create_weights(self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
                           params_dtype: torch.dtype, **attributes: Any) -> None:  # fmt: skip
            """Biases come with the other weights; the planes have a file of their own."""
            if not self.moe.has_bias:
                return
            from vllm.model_executor.utils import set_weight_attrs

            wide = 2 * intermediate_size_per_partition
            for name, width in (("w13_bias", wide), ("w2_bias", hidden_size)):
                bias = torch.nn.Parameter(torch.zeros(num_experts, width, dtype=params_dtype), requires_grad=False)
                layer.register_parameter(name, bias)
                set_weight_attrs(bias, attributes)

        def process_weights_after_loading(self, layer: Any) -> None:
            stored = StoredExperts.of(Statistics.tensors_of(self._path, self._index, ("planes_",)))
            activation, moe = _activation(layer), self.moe
            shape = [stored.into.num_experts, stored.into.width, stored.out.width]
            wanted = [moe.num_experts, moe.hidden_dim, moe.intermediate_size]
            if shape != wanted:
                raise CarpoolError(f"{self._path}: planes of {shape} experts and widths; the model has {wanted}")
            if moe.tp_size > 1:
                stored = stored.part(moe.tp_rank, moe.tp_size, activation.interleaved)
            self.expert_bytes, self.bit_bytes = stored.bytes_read(stored.depths[-1]), stored.bit_bytes
            self.read = reader(stored.to(self._device), activation)

        def get_fused_moe_quant_config(self, layer: Any) -> None:
            return None

        def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor,
                  *args: Any, **kwargs: Any) -> Tensor:  # fmt: skip
            if torch.compiler.is_compiling():
                found: Tensor = getattr(torch.ops.carpool, OP)(x, topk_weights, topk_ids, layer.layer_name)
                return found
            return self.compute(x, topk_weights, topk_ids)

        def compute(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
            """The experts' sum, at the depths that the router left in the buffer."""
            rows = len(x)
            if self.buffer is None:
                depth_NK = torch.full_like(topk_ids, ALL_BITS, dtype=torch.int32)
            else:
                depth_NK = self.buffer[:rows]
            result: Tensor = self.read(x, topk_ids, topk_weights, depth_NK)
            return result

    return PlanesMethod


def _require_plain(moe: Any) -> None:
    """Raises CarpoolError for a set-up under which an expert's rows, or its weights, are not all here."""
    parallel = moe.moe_parallel_config
    for holds, cause in (
        (parallel.use_ep, "expert parallelism"),
        (parallel.dp_size > 1, "data parallelism"),
        (getattr(parallel, "enable_eplb", False), "expert load balancing (EPLB)"),
        (moe.is_sequence_parallel, "sequence parallelism"),
        (moe.is_lora_enabled, "adapters (LoRA) on experts"),
        (not moe.is_act_and_mul, "experts without a gate"),
        (moe.has_bias and moe.tp_size > 1, "tensor parallelism of experts with biases"),
    ):
        if holds:
            raise CarpoolError(f"experts in planes with {cause}: not supported; leave it off, or serve the original")


def _activation(layer: Any) -> Activation:
    """What stands between the projections, from vLLM's layer.

    Raises:
        CarpoolError: nothing that the kernels know.
    """
    kind = layer.activation.value
    biases = getattr(layer, "w13_bias", None), getattr(layer, "w2_bias", None)
    clamp = getattr(layer, "swiglu_limit", None)
    if kind == "silu" and clamp is None and not layer.apply_router_weight_on_input:
        return Activation(False, 0.0, 0.0, *biases)
    if kind == "swigluoai" and not layer.apply_router_weight_on_input:
        return Activation(True, getattr(layer, "swiglu_alpha", None) or ALPHA, clamp or LIMIT, *biases)
    raise CarpoolError(f"{layer.layer_name}: experts with the activation {kind} cannot be read in planes")


@functools.cache
def _define_op() -> Any:
    """Hide the kernels from torch.compile, which traces through vLLM's experts on CPUs; returns the op's library."""
    from vllm.utils.torch_utils import direct_register_custom_op

    library = torch.library.Library("carpool", "FRAGMENT")
    direct_register_custom_op(OP, _read, mutates_args=[], fake_impl=_fake, target_lib=library)
    return library


def _read(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    from vllm.forward_context import get_forward_context

    method = get_forward_context().no_compile_layers[layer_name].routed_experts.quant_method
    result: Tensor = method.compute(x, weights, ids)
    return result


def _fake(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(x)
