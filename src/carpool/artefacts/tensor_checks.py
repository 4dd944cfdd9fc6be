"""What a calibration can have measured in a layer, and every reason why a tensor is not that.

`E` experts, `S` weights of an expert in a sample.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from carpool.artefacts.identity import ENTRIES, SAMPLES
from carpool.errors import CarpoolError

SIMILARITIES = {  # name: lowest possible value
    "similarity_frobenius": 0.0,
    "similarity_cosine": -1.0,
    "similarity_cka": -1.0,
    "similarity_routed": float("-inf"),
}
ASYMMETRIC = ("similarity_routed",)
OTHER_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
TOLERANCE = 1e-5
AGAIN = "run `carpool calibrate MODEL -o stats.safetensors` for this model"


def check_layer(index: int, tensors: Mapping[str, Tensor], num_experts: int, tokens: int) -> None:
    """Raises CarpoolError unless the tensors of a layer are what a calibration over these tokens can have measured."""
    if "coverage" not in tensors or len(tensors) < 2:
        raise CarpoolError(f"layer {index} holds only {sorted(tensors)}, no coverage or nothing beside it; {AGAIN}")
    for name, tensor in tensors.items():
        where = f"layer {index}: {name}"
        if name in SIMILARITIES:
            _check_kind(where, tensor, torch.float32, [num_experts, num_experts])
            _check_similarity(where, name, tensor)
        elif name == "coverage":
            _check_kind(where, tensor, torch.int64, [num_experts])
            if not ((tensor >= 0) & (tensor <= tokens)).all():
                raise CarpoolError(f"{where} must lie between 0 and the {tokens} tokens seen; {AGAIN}")
        elif name in SAMPLES:
            if tensor.dim() != 2 or len(tensor) > num_experts:
                raise CarpoolError(f"{where} is no [E, S] of at most {num_experts} experts; {AGAIN}")
            _check_kind(where, tensor, torch.bfloat16, [len(tensor), ENTRIES])
            if not tensor.isfinite().all():
                raise CarpoolError(f"{where} holds NaN or inf: the model's weights do; {AGAIN}")
        elif tensor.dtype not in OTHER_DTYPES or not tensor.isfinite().all():
            raise CarpoolError(f"{where} is {tensor.dtype} or holds NaN or inf; {AGAIN}")


def _check_kind(where: str, tensor: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    if tensor.dtype != dtype or list(tensor.shape) != shape:
        raise CarpoolError(f"{where} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {shape}; {AGAIN}")


def _check_similarity(where: str, name: str, similarity_EE: Tensor) -> None:
    if not similarity_EE.isfinite().all():
        raise CarpoolError(f"{where} holds NaN or inf; {AGAIN}")
    lowest = SIMILARITIES[name]
    found = (float(similarity_EE.min()), float(similarity_EE.max()))
    if found[0] < lowest - TOLERANCE or found[1] > 1 + TOLERANCE:
        raise CarpoolError(f"{where} goes from {found[0]:.3g} to {found[1]:.3g}, outside [{lowest:g}, 1]; {AGAIN}")
    if (similarity_EE.diagonal() - 1).abs().max() > TOLERANCE:
        raise CarpoolError(f"{where}: an expert's similarity with itself is not 1; {AGAIN}")
    if name not in ASYMMETRIC and (similarity_EE - similarity_EE.T).abs().max() > TOLERANCE:
        raise CarpoolError(f"{where} is not symmetric; {AGAIN}")
    # two experts: their distance is the layer's largest, so that Frobenius similarity is 0 by definition
    if len(similarity_EE) > 2 and torch.equal(similarity_EE, torch.eye(len(similarity_EE), device="cpu")):
        raise CarpoolError(f"{where} is the identity matrix, so it was never calibrated; {AGAIN}")
