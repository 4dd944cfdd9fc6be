"""ExFlow's integer programme itself, by HiGHS: a certificate for what descent finds, where the problem is small.

`J = L - 1` pairs of consecutive layers, `E` experts, `D` devices, `V` variables.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from carpool.placement.exflow import exflow, hops
from carpool.placement.placement import Placement, from_devices, slots_for
from carpool.placement.solvers import minimise

SECONDS = 60.0


def exflow_exact(transitions_JEE: Tensor, devices: int, *, seconds: float = SECONDS, seed: int = 0) -> Placement:
    """The fewest hops, or the best that was found in time beside a bound below which no placement is.

    Equations 8 to 12 of the paper with the tokens of equal transitions counted together: `x[l, e, d]` says that an
    expert lies on a device, `r[j, a, b]` that a transition hops, `r >= x[a] - x[b]` on every device. Only 2 devices, or
    few experts, are solved to the end in a minute. What it finds in time depends on the machine, so that ranks may not
    solve it each for itself. The better of it and of descent is returned.

    Args:
        seconds: limit. seed: of the descent (`exflow`).

    Raises:
        CarpoolError: experts and devices that do not divide; SciPy is missing.
    """
    num_experts = transitions_JEE.shape[1]
    layers, slots = len(transitions_JEE) + 1, slots_for(num_experts, devices)
    placed = torch.arange(layers * num_experts * devices).view(layers, num_experts, devices)
    moves_R3 = transitions_JEE.nonzero()
    moved_R = placed.numel() + torch.arange(len(moves_R3))
    variables = placed.numel() + len(moves_R3)
    cost_V = torch.zeros(variables, dtype=torch.float64)
    cost_V[moved_R] = transitions_JEE[tuple(moves_R3.T)].double()
    integer_V = torch.zeros(variables, dtype=torch.int64)
    integer_V[: placed.numel()] = 1  # hops are whole by themselves
    solved = minimise(cost_V, integer_V, _each_once(placed, slots), _hops_counted(placed, moves_R3, moved_R), seconds)
    best = exflow(transitions_JEE, devices, seed=seed)
    device_LE, value = best.device_LE, best.value
    if solved.x is not None:
        found_LE = solved.x[: placed.numel()].view(layers, num_experts, devices).argmax(-1)
        if hops(transitions_JEE, found_LE) < value:
            device_LE, value = found_LE, float(hops(transitions_JEE, found_LE))
    bound = max(0.0, ceil(solved.bound - 1e-6))  # hops are whole
    return Placement(
        from_devices(device_LE, devices), num_experts, 1, "exflow-exact", best.objective, value,
        bound=bound, status="optimal" if value <= bound else "heuristic", seed=seed,
    )  # fmt: skip


def _each_once(placed: Tensor, slots: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Every expert lies on one device, every device has its slots full. Devices are alike, so that expert `i` of the
    first layer may be asked to lie on one of the first `i + 1` devices."""
    num_experts, devices = placed.shape[1:]
    by_expert = placed.reshape(-1, devices)
    by_device = placed.transpose(1, 2).reshape(-1, num_experts)
    later_ED = torch.arange(devices) > torch.arange(num_experts).unsqueeze(1)
    barred = placed[0][later_ED]
    parts = (by_expert, by_device, barred.view(-1, 1))
    row, column, first = [], [], 0
    for part in parts:
        row.append((first + torch.arange(len(part))).unsqueeze(1).expand_as(part).reshape(-1))
        column.append(part.reshape(-1))
        first += len(part)
    bound = torch.cat([torch.ones(len(by_expert)), torch.full((len(by_device),), slots), torch.zeros(len(barred))])
    columns = torch.cat(column)
    return (torch.cat(row), columns, torch.ones(len(columns))), bound


def _hops_counted(placed: Tensor, moves_R3: Tensor, moved_R: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """`x[a, d] - x[b, d] - r <= 0` for every transition and device."""
    devices = placed.shape[-1]
    layer, one, other = moves_R3.T
    first_RD, second_RD = placed[layer, one], placed[layer + 1, other]
    row_RD = torch.arange(first_RD.numel()).view(-1, devices)
    moved_RD = moved_R.unsqueeze(1).expand_as(first_RD)
    columns = torch.stack([first_RD, second_RD, moved_RD])
    values = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(columns.shape)
    rows = row_RD.expand(columns.shape)
    return (rows.reshape(-1), columns.reshape(-1), values.reshape(-1)), torch.zeros(first_RD.numel())
