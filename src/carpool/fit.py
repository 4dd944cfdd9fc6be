"""Will a model fit into memory, and how fast can it be at most where it does not? From its configuration alone."""

from __future__ import annotations

from pathlib import Path

from carpool.doctor import Diagnosis, config_of, diagnose, shell_of
from carpool.offloading.estimate import Estimate

PLANES = (6, 4, 3, 2)  # depths that `carpool compress` stores
SCALE = 16 / 32  # bits of a scale, by group of inputs
HIT_RATES = (0.5, 0.8, 0.95)


def estimates(model: str | Path, memory: int, disk: int) -> list[Estimate]:
    """The model's experts as they are stored, then in planes of each depth.

    Args:
        memory: bytes for all weights. disk: bytes a second that can be read.

    Raises:
        CarpoolError: what `carpool.doctor.diagnose` raises.
    """
    found = diagnose(model)
    numbers, rest = _numbers(model)
    stored = 8 * found.expert_bytes / numbers
    wanted = [stored, *(depth + SCALE for depth in PLANES if depth + SCALE < stored)]
    return [_estimate(found, bits, numbers, rest, memory, disk) for bits in wanted]


def _estimate(found: Diagnosis, bits: float, numbers: int, rest: float, memory: int, disk: int) -> Estimate:
    return Estimate.of(bits, numbers, found.num_experts, found.moe_layers, found.top_k, rest, memory, disk)


def _numbers(model: str | Path) -> tuple[int, float]:
    """Weights of one expert, and bytes of all that is no expert."""
    import torch

    from carpool.hosts.transformers import find_layers

    config = config_of(model)
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is no expert is hardly ever quantised
    shell = shell_of(config, model)
    layers = find_layers(shell)
    routed = {id(one) for layer in layers for one in layer.experts.parameters()}
    rest = sum(one.numel() for one in shell.parameters() if id(one) not in routed) * dtype.itemsize
    first = layers[0]
    return sum(one.numel() for one in first.experts.parameters()) // first.num_experts, float(rest)
