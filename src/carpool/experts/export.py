"""Quantised experts in the formats of other engines: rounded weights in their own dtype, or compressed-tensors'."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from carpool.artefacts.checkpoint import METHOD
from carpool.artefacts.weights import ExpertTensor
from carpool.errors import CarpoolError
from carpool.experts.planes import Planes
from carpool.experts.stored import StoredExperts

Format = Literal["planes", "compressed-tensors", "rounded"]
PACKED_BITS = (4, 8)  # that engines have kernels for
GATE, UP, DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")


@dataclass(frozen=True, eq=False)
class Original:
    """A layer's experts as the model holds them: `into_ERH`, gate before up (`R = 2 I`; `I` without a gate), and
    `out_EHI`."""

    into_ERH: Tensor
    out_EHI: Tensor


@dataclass(frozen=True, eq=False)
class Export:
    """What takes the place of an expert's tensor in a checkpoint (see `carpool.artefacts.weights.Weights.copy`).

    Attributes:
        layers: quantised experts by layer, at one depth. original: what they were made from.
        form: of the checkpoint. `planes` leaves the matrices out, since a file of its own holds them.
    """

    layers: Mapping[int, StoredExperts]
    original: Mapping[int, Original]
    form: Format

    def __call__(self, one: ExpertTensor, tensor: Tensor) -> dict[str, Tensor]:
        """Tensors by name.

        Raises:
            CarpoolError: the tensor is not what the model holds, so that nobody knows which part of an expert it is.
        """
        if one.is_bias or one.layer not in self.layers:
            return {one.name: tensor}
        planes, experts, rows, transposed = self._place(one, tensor)
        if self.form == "planes":
            return {}
        depth, some = planes.depths[-1], planes.of_experts(experts)
        if self.form == "rounded":
            weight_ERI = some.read(depth)[:, rows].to(tensor.dtype)
            weight_ERI = weight_ERI.mT if transposed else weight_ERI
            return {one.name: weight_ERI[0] if one.expert is not None else weight_ERI}
        if one.expert is None or not one.name.endswith(".weight"):
            raise CarpoolError(
                f"{one.name} holds all experts in one tensor, for which compressed-tensors has no form; use another "
                "--format"
            )
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        codes_RI = (some.codes(depth)[0, rows] - 2 ** (depth - 1)).to(torch.int8)
        base = one.name.removesuffix("weight")
        return {
            f"{base}weight_packed": pack_to_int32(codes_RI, depth),
            f"{base}weight_scale": some.scale(depth)[0, rows].to(tensor.dtype),
            f"{base}weight_shape": torch.tensor(codes_RI.shape, dtype=torch.int64),
        }

    def _place(self, one: ExpertTensor, tensor: Tensor) -> tuple[Planes, slice, slice, bool]:
        """The matrix, the experts and the rows of it that a tensor holds, and whether it holds them transposed."""
        stored, original = self.layers[one.layer], self.original[one.layer]
        experts = slice(None) if one.expert is None else slice(one.expert, one.expert + 1)
        down = one.part in DOWN
        planes, whole_ERI = (stored.out, original.out_EHI) if down else (stored.into, original.into_ERH)
        rows = slice(None)
        if one.part in (*GATE, *UP) and whole_ERI.shape[1] == 2 * original.out_EHI.shape[2]:
            half = original.out_EHI.shape[2]
            rows = slice(0, half) if one.part in GATE else slice(half, None)
        wanted_ERI = whole_ERI[experts, rows]
        given_ERI = tensor.float() if one.expert is None else tensor.float().unsqueeze(0)
        for transposed in (False, True):
            seen_ERI = given_ERI.mT if transposed else given_ERI
            if seen_ERI.shape == wanted_ERI.shape and torch.equal(seen_ERI, wanted_ERI):
                return planes, experts, rows, transposed
        raise CarpoolError(
            f"{one.name} is not what the model holds of its experts, so that it cannot be replaced: models of this "
            "family can be compressed into a single file only (-o experts.safetensors)"
        )


def compressed_tensors_config(bits: int, group: int, names: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose routed experts alone are packed integers.

    Args:
        names: of the source's tensors; those that belong to no expert stay as they are.
    """
    kept = [name.removesuffix(".weight") for name in names if name.endswith(".weight") and not ExpertTensor.of(name)]
    weights = {
        "num_bits": bits, "type": "int", "strategy": "group", "group_size": group, "symmetric": True, "dynamic": False,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": sorted({*kept, "lm_head"}),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


def planes_config(file: str, stored: StoredExperts) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose routed experts are planes in a file beside it."""
    return {
        "quant_method": METHOD, "format": "planes", "file": file, "depths": list(stored.depths),
        "group_size": stored.into.group,
    }  # fmt: skip
