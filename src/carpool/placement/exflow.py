"""ExFlow: experts that follow one another in consecutive layers lie on one device (arXiv 2401.08383).

It pays only where a token stays on the device of its last expert (ExFlow's context coherence); where tokens go home
between layers, as in today's serving engines, these hops are not what is sent.

`J = L - 1` pairs of consecutive layers, `E` experts, `D` devices on `M` nodes, `C = E / D` experts of a device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from carpool.placement.placement import Placement, from_devices, slots_for
from carpool.placement.solvers import assign

STARTS = 20  # random ones, beside experts in order
SWEEPS = 100  # at most; a fixpoint comes much sooner


def exflow(
    transitions_JEE: Tensor, devices: int, nodes: int = 1, *, seed: int = 0, starts: int = STARTS,
    progress: Callable[[int], None] = lambda starts: None,
) -> Placement:  # fmt: skip
    """Few hops from device to device between the experts of consecutive layers; on several nodes first few hops between
    nodes, then within each, as the paper does it in stages.

    The integer programme of the paper (its equations 8 to 12; `exflow_exact` solves it where it is small), by descent:
    with all other layers held, a layer is an assignment of experts to slots, which is solved exactly; sweeps forward
    and back until nothing changes, from experts in order and from random starts. No guarantee; equal on every rank for
    equal input and versions.

    Args:
        transitions_JEE: tokens that go from an expert to one of the next layer.
        starts: random starts. seed: of them. progress: told 1 after each start.

    Raises:
        CarpoolError: experts, devices or nodes that do not divide; SciPy is missing.
    """
    slots_for(transitions_JEE.shape[1], devices, nodes)
    generator = torch.Generator().manual_seed(seed)
    device_LE = staged(transitions_JEE, devices, nodes, lambda moves, parts, within_LE: _best(
        moves, parts, within_LE, starts, generator, progress))  # fmt: skip
    return Placement(
        from_devices(device_LE, devices), transitions_JEE.shape[1], nodes, "exflow",
        objective="hops between devices of consecutive layers", value=float(hops(transitions_JEE, device_LE)),
        status="heuristic", seed=seed,
    )  # fmt: skip


Split = Callable[[Tensor, int, Tensor], Tensor]


def staged(transitions_JEE: Tensor, devices: int, nodes: int, split: Split) -> Tensor:
    """Device of every expert `[L, E]` by a rule that splits the experts of every layer into equal parts: over nodes,
    then over the devices of each node.

    Args:
        split: takes transitions `[J, I, I]`, a number of parts, and `[L, I]`, the experts themselves in order.
    """
    layers, num_experts = len(transitions_JEE) + 1, transitions_JEE.shape[1]
    all_LE = torch.arange(num_experts).expand(layers, -1)
    if nodes == 1:
        return split(transitions_JEE, devices, all_LE)
    node_LE = split(transitions_JEE, nodes, all_LE)
    within, device_LE = devices // nodes, torch.zeros_like(node_LE)
    if within == 1:
        return node_LE
    for node in range(nodes):
        own_LI = (node_LE == node).nonzero()[:, 1].view(layers, -1)
        moves_JII = torch.stack([
            one[own_I][:, next_I] for one, own_I, next_I in zip(transitions_JEE, own_LI[:-1], own_LI[1:], strict=True)
        ])  # fmt: skip
        device_LE.scatter_(1, own_LI, split(moves_JII, within, own_LI) + node * within)
    return device_LE


def hops(transitions_JEE: Tensor, device_LE: Tensor) -> int:
    """Tokens times layers that go to another device."""
    apart_JEE = device_LE[:-1].unsqueeze(2) != device_LE[1:].unsqueeze(1)
    return int((transitions_JEE * apart_JEE).sum())


def _best(
    transitions_JEE: Tensor, parts: int, experts_LE: Tensor, starts: int, generator: torch.Generator,
    progress: Callable[[int], None],
) -> Tensor:  # fmt: skip
    layers, num_experts = experts_LE.shape
    slots = num_experts // parts
    best_LE, fewest = experts_LE, None
    for start in range(starts + 1):
        order_LE = torch.arange(num_experts).expand(layers, -1)
        if start:
            order_LE = torch.rand(layers, num_experts, generator=generator).argsort(-1)
        found_LE = descend(transitions_JEE, order_LE // slots, parts)
        count = hops(transitions_JEE, found_LE)
        if fewest is None or count < fewest:
            best_LE, fewest = found_LE, count
        progress(1)
    return best_LE


def descend(transitions_JEE: Tensor, device_LE: Tensor, parts: int) -> Tensor:
    """Improve a balanced placement layer by layer until no single layer can be improved; hops never grow."""
    device_LE = device_LE.clone()
    layers, num_experts = device_LE.shape
    slot_I = torch.arange(parts).repeat_interleave(num_experts // parts)  # the device of each slot
    way = [*range(layers), *range(layers - 2, 0, -1)]
    for _ in range(SWEEPS):
        before = hops(transitions_JEE, device_LE)
        for layer in way:
            gain_EP = torch.zeros(num_experts, parts, dtype=torch.float64)
            if layer:
                of_last_EP = torch.nn.functional.one_hot(device_LE[layer - 1], parts).double()
                gain_EP += transitions_JEE[layer - 1].double().T @ of_last_EP
            if layer < layers - 1:
                gain_EP += (
                    transitions_JEE[layer].double() @ torch.nn.functional.one_hot(device_LE[layer + 1], parts).double()
                )
            device_LE[layer] = slot_I[assign(gain_EP[:, slot_I])]
        if hops(transitions_JEE, device_LE) == before:
            return device_LE
    return device_LE
