"""A sample of the experts' weights, taken before vLLM packs them for its kernels; statistics are checked against it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.identity import Held, Sample, sample


@contextmanager
def sampling() -> Iterator[None]:
    """Experts that are built in the block keep a sample of their weights each time that vLLM has loaded them, in this
    block or later (`reload_weights`). Nothing stays patched but the objects built."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    kind: Any = RoutedExperts
    make = kind._get_quant_method

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = make(self, *args, **kwargs)
        process = method.process_weights_after_loading

        def sampled(experts: Any) -> Any:
            _take(experts)
            return process(experts)

        method.process_weights_after_loading = sampled
        return method

    kind._get_quant_method = watched
    try:
        yield
    finally:
        kind._get_quant_method = make


def taken(experts: Any) -> Sample:
    """The sample that was taken of a layer's experts."""
    return getattr(experts, "carpool_sample", Sample(hidden="weights that were packed before anybody could look"))


def _take(experts: Any) -> None:
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.model_executor.utils import is_weights_pre_processed

    # some methods are called again once they have quantised what they were given
    if is_weights_pre_processed() or getattr(experts, "_already_called_process_weights_after_loading", False):
        return
    held = _held(experts)
    method = type(experts.quant_method).__name__
    hidden = Sample(hidden=f"weights as {method} packs them")
    experts.carpool_sample = hidden if held is None else sample(extract_layer_index(experts.layer_name), held)


def _held(experts: Any) -> Held | None:
    """The weights of this rank, or None where they are packed."""
    moe = experts.moe_config
    columns, width, hidden = (
        moe.intermediate_size_per_partition_unpadded, moe.intermediate_size, moe.hidden_dim_unpadded,
    )  # fmt: skip
    into_ERH = _matrix(experts, "w13_weight", columns * (2 if moe.is_act_and_mul else 1), hidden)
    out_EHI = _matrix(experts, "w2_weight", hidden, columns)
    if out_EHI is None:
        return None
    padded = out_EHI.shape[2] > columns  # then nobody says where the rows of the gate end
    experts_E = torch.arange(moe.num_experts) if experts._expert_map is None else experts._expert_map
    return Held(
        None if padded else into_ERH,
        out_EHI[:, :, :columns],
        width,
        first=moe.tp_rank * columns,
        places=experts_E[: moe.num_logical_experts],  # replicas come after them
        hidden_size=hidden,
    )


def _matrix(experts: Any, name: str, rows: int, columns: int) -> Tensor | None:
    """A weight that has at least as many rows and columns; packed ones have fewer."""
    weight = getattr(experts, name, None)
    if not isinstance(weight, Tensor) or weight.dim() != 3 or weight.shape[1] < rows or weight.shape[2] < columns:
        return None
    return weight
