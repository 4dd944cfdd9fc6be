"""Placements that every planner has to beat: experts in order, in turns, and at random."""

from __future__ import annotations

import torch

from carpool.placement.placement import Placement, from_devices, slots_for


def linear(layers: int, num_experts: int, devices: int, nodes: int = 1, *, redundant: int = 0) -> Placement:
    """The first device has the first experts, as engines place them by default; redundant ones begin anew behind the
    last, as in vLLM."""
    slots = slots_for(num_experts, devices, nodes, redundant)
    expert_LR = (torch.arange(num_experts + redundant) % num_experts).repeat(layers, 1)
    return Placement(expert_LR.view(layers, devices, slots), num_experts, nodes, "linear")


def linear_like(placement: Placement) -> Placement:
    """Experts in order on the devices of a placement: once where they divide among them, else in as many places."""
    experts, devices = placement.num_experts, placement.devices
    redundant = devices * placement.slots - experts if experts % devices else 0
    return linear(placement.layers, experts, devices, placement.nodes, redundant=redundant)


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
