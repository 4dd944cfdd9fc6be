"""EPLB: experts with many tokens get replicas, and replicas are packed so that devices have equal loads.

DeepSeek's expert parallelism load balancer (github.com/deepseek-ai/EPLB), as vLLM, SGLang and TensorRT-LLM run it.
`X` rows (layers, or nodes of layers), `I` items, `P` packs, `R` replicas.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.placement.placement import Placement, slots_for


def eplb(loads_LE: Tensor, devices: int, nodes: int = 1, *, redundant: int = 0, groups: int = 1) -> Placement:
    """Balance tokens over devices, if the tokens of an expert split evenly over its replicas.

    Groups of experts are packed onto nodes where they divide among them, replicas are made inside a node, then packed
    onto its devices; every step is greedy (longest first), so that there is no guarantee. Two replicas of one expert
    may come to lie on one device (`Placement.wasted`), as in the original.

    Args:
        loads_LE: tokens of each expert.
        redundant: replicas beyond one of each expert; with `E` they fill the devices evenly.
        groups: expert groups of the model, which stay on one node.

    Raises:
        CarpoolError: experts, devices, nodes or groups that do not divide.
    """
    layers, num_experts = loads_LE.shape
    slots = slots_for(num_experts, devices, nodes, redundant)
    if groups < 1 or num_experts % groups:
        raise CarpoolError(f"{num_experts} experts do not divide into {groups} groups")
    expert_LR = physical_to_logical(loads_LE, devices * slots, groups, nodes, devices)
    placement = Placement(
        expert_LR.view(layers, devices, slots), num_experts, nodes, "eplb",
        objective="tokens of the busiest device, mean over layers", status="heuristic",
    )  # fmt: skip
    peak_L = even_loads(placement, loads_LE).amax(-1)
    floor_L = torch.maximum(loads_LE.double().sum(-1) / devices, _least_peak(loads_LE, devices))
    return replace(placement, value=float(peak_L.mean()), bound=float(floor_L.mean()))


def even_loads(placement: Placement, loads_LE: Tensor) -> Tensor:
    """Float64 `[L, D]`: tokens of each device, if those of an expert split evenly over its slots."""
    expert_LR = placement.expert_LDS.flatten(1)
    slots_LE = torch.zeros(loads_LE.shape, dtype=torch.int64).scatter_add_(1, expert_LR, torch.ones_like(expert_LR))
    each_LE = loads_LE.double() / slots_LE
    return each_LE.unsqueeze(1).expand(-1, placement.devices, -1).gather(2, placement.expert_LDS).sum(-1)


def _least_peak(loads_LE: Tensor, devices: int) -> Tensor:
    """Float64 `[L]`: a device has at least its share of the most loaded expert, which has a replica everywhere."""
    return loads_LE.double().amax(-1) / devices


def physical_to_logical(loads_LE: Tensor, replicas: int, groups: int, nodes: int, devices: int) -> Tensor:
    """Int64 `[L, R]`, the expert of each physical slot: DeepSeek's `rebalance_experts`, whose slots are in the order of
    devices. Sorting is stable where the original's leaves ties open."""
    if groups % nodes:
        groups = nodes = 1  # the "global" form
    weight_LE = loads_LE.double()
    layers, num_experts = weight_LE.shape
    size = num_experts // groups
    # 1: groups of experts onto nodes
    pack_LG, rank_LG = balanced_packing(weight_LE.view(layers, groups, size).sum(-1), nodes)
    first_LG = (pack_LG * (groups // nodes) + rank_LG) * size
    local_LE = (first_LG.unsqueeze(-1) + torch.arange(size)).flatten(1)  # of each expert, in the order of nodes
    expert_LE = local_LE.argsort(-1)
    # 2: replicas inside each node
    per_node = num_experts // nodes
    weight_XI = weight_LE.gather(1, expert_LE).view(-1, per_node)
    item_XR, count_XI = replicate(weight_XI, replicas // nodes)
    # 3: replicas onto the devices of the node
    each_XR = (weight_XI / count_XI).gather(1, item_XR)
    pack_XR, rank_XR = balanced_packing(each_XR, devices // nodes)
    slot_XR = pack_XR * (replicas // devices) + rank_XR
    item_XR = item_XR.gather(1, slot_XR.argsort(-1))
    node_first = torch.arange(nodes).view(1, nodes, 1) * per_node
    return expert_LE.gather(1, (item_XR.view(layers, nodes, -1) + node_first).flatten(1))


def balanced_packing(weight_XI: Tensor, packs: int) -> tuple[Tensor, Tensor]:
    """Heaviest first, each to the lightest pack that is not full: pack and place in it of each item, int64 `[X, I]`."""
    rows, items = weight_XI.shape
    full = items // packs
    if full == 1:
        return torch.arange(items).expand(rows, -1), torch.zeros(rows, items, dtype=torch.int64)
    load_XP = torch.zeros(rows, packs, dtype=torch.float64)
    count_XP = torch.zeros(rows, packs, dtype=torch.int64)
    pack_XI, rank_XI = torch.zeros(2, rows, items, dtype=torch.int64)
    for item_X in (-weight_XI).argsort(dim=-1, stable=True).T:
        item_X1 = item_X.unsqueeze(1)
        pack_X1 = load_XP.masked_fill(count_XP == full, torch.inf).argmin(-1, keepdim=True)
        pack_XI.scatter_(1, item_X1, pack_X1)
        rank_XI.scatter_(1, item_X1, count_XP.gather(1, pack_X1))
        load_XP.scatter_add_(1, pack_X1, weight_XI.gather(1, item_X1))
        count_XP.scatter_add_(1, pack_X1, torch.ones_like(pack_X1))
    return pack_XI, rank_XI


def replicate(weight_XI: Tensor, replicas: int) -> tuple[Tensor, Tensor]:
    """One more replica, again and again, for the item with the most tokens a replica: the item of each replica, int64
    `[X, R]`, and how many each item has, `[X, I]`."""
    rows, items = weight_XI.shape
    item_XR = torch.arange(replicas).repeat(rows, 1)
    count_XI = torch.ones(rows, items, dtype=torch.int64)
    for place in range(items, replicas):
        most_X1 = (weight_XI / count_XI).argmax(-1, keepdim=True)
        item_XR[:, place : place + 1] = most_X1
        count_XI.scatter_add_(1, most_X1, torch.ones_like(most_X1))
    return item_XR, count_XI
