"""METRO: each expert that a step activates is computed on one of the devices that hold it, so that no device computes
many (arXiv 2512.09277). While decoding, a device's time is that of the experts it reads.

`X` steps, `D` devices, `E` experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.errors import CarpoolError


def fewest_activated(active_XE: Tensor, holds_DE: Tensor, *, fewest_first: bool = True) -> Tensor:
    """The device on which each active expert is computed, int64 `[X, E]`, -1 for those that are not active.

    Objective: the most experts that one device computes in a step. Greedy: an expert goes to the device with the fewest
    so far (the first of them) among those that hold it. There is no guarantee; `least_peak` is the optimum. The result
    does not depend on a seed, and every rank that knows the experts of the step finds the same.

    Args:
        active_XE: bool, the experts that some row of the step chose.
        holds_DE: bool, which device holds which expert.
        fewest_first: experts with the fewest replicas choose first (those with one have no choice); otherwise in the
            order of their numbers, as the paper does.

    Raises:
        CarpoolError: an active expert that no device holds.
    """
    replicas_E = holds_DE.sum(0)
    lost_E = active_XE.any(0) & (replicas_E == 0)
    if lost_E.any():
        raise CarpoolError(f"no device holds expert {int(lost_E.nonzero()[0])}, which a step activates")
    order = replicas_E.argsort(stable=True) if fewest_first else torch.arange(len(replicas_E))
    steps, devices = len(active_XE), len(holds_DE)
    load_XD = torch.zeros(steps, devices, dtype=torch.int64)
    device_XE = torch.full(active_XE.shape, -1, dtype=torch.int64)
    for expert in order.tolist():
        here = holds_DE[:, expert]
        if not here.any():
            continue
        least_X = load_XD.masked_fill(~here, torch.iinfo(torch.int64).max).argmin(-1)
        active_X = active_XE[:, expert]
        device_XE[:, expert] = torch.where(active_X, least_X, -1)
        load_XD.scatter_add_(1, least_X.unsqueeze(1), active_X.long().unsqueeze(1))
    return device_XE


def activated_XD(device_XE: Tensor, devices: int) -> Tensor:
    """Int64 `[X, D]`: experts that each device computes."""
    counted = torch.zeros(len(device_XE), devices + 1, dtype=torch.int64)
    counted.scatter_add_(1, device_XE + 1, torch.ones_like(device_XE))
    return counted[:, 1:]


def least_peak(active_E: Tensor, holds_DE: Tensor) -> int:
    """The fewest experts that the busiest device of one step can compute: the exact optimum, by maximum flow.

    Needs SciPy (`carpool[placement]`).

    Raises:
        CarpoolError: SciPy is missing, or an active expert that no device holds.
    """
    experts = active_E.nonzero().flatten()
    held_DA = holds_DE[:, experts]
    if not held_DA.any(0).all():
        raise CarpoolError(f"no device holds expert {int(experts[~held_DA.any(0)][0])}, which a step activates")
    low, high = -(-len(experts) // len(holds_DE)), len(experts)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits(held_DA, middle) else (middle + 1, high)
    return low


def _fits(held_DA: Tensor, most: int) -> bool:
    """Whether every expert finds a device that holds it, no device taking more than `most`: a flow from a source over
    devices (capacity `most`) and experts (1) to a sink that fills the sink."""
    from carpool.placement.solvers import maximum_flow

    devices, experts = held_DA.shape
    source, sink = devices + experts, devices + experts + 1
    device, expert = held_DA.nonzero(as_tuple=True)
    begin = torch.cat([torch.full((devices,), source), device, torch.arange(experts) + devices])
    end = torch.cat([torch.arange(devices), expert + devices, torch.full((experts,), sink)])
    capacity = torch.ones(len(begin), dtype=torch.int64)
    capacity[:devices] = most
    return maximum_flow(begin, end, capacity, source, sink) == experts
