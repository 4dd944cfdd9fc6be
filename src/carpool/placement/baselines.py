"""Placements that every planner has to beat: experts in order, in turns, and at random."""

from __future__ import annotations

import torch

from carpool.placement.placement import Placement, from_devices, slots_for


def linear(layers: int, num_experts: int, devices: int, nodes: int = 1) -> Placement:
    """The first device has the first experts, as engines place them by default."""
    slots = slots_for(num_experts, devices, nodes)
    device_LE = (torch.arange(num_experts) // slots).expand(layers, -1)
    return Placement(from_devices(device_LE, devices), num_experts, nodes, "linear")


def round_robin(layers: int, num_experts: int, devices: int, nodes: int = 1) -> Placement:
    """Consecutive experts lie on consecutive devices."""
    slots_for(num_experts, devices, nodes)
    device_LE = (torch.arange(num_experts) % devices).expand(layers, -1)
    return Placement(from_devices(device_LE, devices), num_experts, nodes, "round-robin")


def random(layers: int, num_experts: int, devices: int, nodes: int = 1, *, seed: int = 0) -> Placement:
    """Every layer's experts are shuffled anew."""
    slots = slots_for(num_experts, devices, nodes)
    generator = torch.Generator().manual_seed(seed)
    order_LE = torch.rand(layers, num_experts, generator=generator).argsort(-1)
    return Placement(order_LE.view(layers, devices, slots).sort(-1).values, num_experts, nodes, "random", seed=seed)
