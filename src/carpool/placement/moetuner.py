"""MoETuner: first clusters of experts with equal loads, then clusters that follow one another on one device
(arXiv 2502.06643). The baseline of ExFlow for routing of several experts.

`J = L - 1` pairs of consecutive layers, `E` experts, `D` devices of `C = E / D` experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.placement.eplb import balanced_packing
from carpool.placement.exflow import hops
from carpool.placement.placement import Placement, from_devices, slots_for
from carpool.placement.solvers import assign


def moetuner(loads_LE: Tensor, transitions_JEE: Tensor, devices: int, nodes: int = 1) -> Placement:
    """Equal loads in every layer, then few tokens between devices.

    The paper solves both steps as integer programmes with Gurobi. Here the first is greedy packing of equally many
    experts (longest first; the paper also allows unequal numbers), the second assigns a layer's clusters to devices
    exactly, with the neighbouring layers held, in sweeps until nothing changes; links between devices count as equal.

    Args:
        loads_LE: tokens of each expert. transitions_JEE: tokens that go from an expert to one of the next layer.

    Raises:
        CarpoolError: experts, devices or nodes that do not divide; SciPy is missing.
    """
    layers, num_experts = loads_LE.shape
    slots_for(num_experts, devices, nodes)
    cluster_LE, _ = balanced_packing(loads_LE.double(), devices)
    is_in_LED = torch.nn.functional.one_hot(cluster_LE, devices).double()
    between_JDD = is_in_LED[:-1].mT @ transitions_JEE.double() @ is_in_LED[1:]
    place_LD = torch.arange(devices).repeat(layers, 1)  # of each cluster
    changed = True
    while changed:
        before = _moved(between_JDD, place_LD)
        for layer in range(layers):
            gain_DD = torch.zeros(devices, devices, dtype=torch.float64)  # cluster, device
            if layer:
                gain_DD += between_JDD[layer - 1].T[:, place_LD[layer - 1].argsort()]
            if layer < layers - 1:
                gain_DD += between_JDD[layer][:, place_LD[layer + 1].argsort()]
            place_LD[layer] = assign(gain_DD)
        changed = _moved(between_JDD, place_LD) < before
    device_LE = place_LD.gather(1, cluster_LE)
    return Placement(
        from_devices(device_LE, devices), num_experts, nodes, "moetuner",
        objective="equal loads, then transitions between devices", value=float(hops(transitions_JEE, device_LE)),
        status="heuristic",
    )  # fmt: skip


def _moved(between_JDD: Tensor, place_LD: Tensor) -> float:
    stays = place_LD[:-1].unsqueeze(2) == place_LD[1:].unsqueeze(1)
    return float((between_JDD * ~stays).sum())
