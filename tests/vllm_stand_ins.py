"""In place of the kernels of quantised experts that a CPU lacks: all before them runs as it is.

vLLM loads the weights by their format, chooses the kernel and routes. What would be computed is a simple function of
the ids and weights that reach the kernel, so that other routing gives other tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

KERNELS = ("CPUExpertsFp8", "CPUExpertsMxfp4", "CPUExpertsInt4", "CPUExpertsInt8")
PACKING = ("prepare_fp8_moe_layer_for_cpu", "prepare_mxfp4_moe_layer_for_cpu", "prepare_int4_moe_layer_for_cpu")


@contextlib.contextmanager
def stood_in() -> Iterator[list[Tensor]]:
    """Engines that start here have stand-ins; yields the ids of every call, `[N, K]`."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    seen: list[Tensor] = []

    def apply(self: Any, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor,
              topk_ids: Tensor, *_: Any, **__: Any) -> None:  # fmt: skip
        seen.append(topk_ids.clone())
        angles_NKH = topk_ids.unsqueeze(-1) + torch.arange(hidden_states.shape[-1])
        output.copy_((topk_weights.unsqueeze(-1) * angles_NKH.cos() * hidden_states.unsqueeze(1)).sum(1))

    with contextlib.ExitStack() as stack:
        for name in KERNELS:
            kernel = getattr(cpu_moe, name)
            for method, value in (("_supports_current_device", staticmethod(lambda: True)), ("apply", apply)):
                stack.enter_context(patch.object(kernel, method, value))
            if name == "CPUExpertsInt8":
                stack.enter_context(patch.object(kernel, "process_weights_after_loading", lambda self, layer: None))
        for name in PACKING:
            stack.enter_context(patch.object(cpu_moe, name, _unpacked))
        yield seen


def _unpacked(*tensors: Tensor, w13_zeros: Tensor | None = None, w2_zeros: Tensor | None = None,
              quant_algo: Any = None) -> tuple[Tensor, ...]:  # fmt: skip
    """Weights and scales as they were loaded, for four bits with zero points where there are none."""
    if quant_algo is None:
        return tensors
    zeros = [tensors[-1].int() if given is None else given for given in (w13_zeros, w2_zeros)]
    return (*tensors, *zeros)
