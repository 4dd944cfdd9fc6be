"""Experts that tokens choose together lie on one device, so that a token is sent to few: co-activation placement.

C2R's idea (arXiv 2504.01337) without changing the routing, as GRACE-MoE and Occult place experts. It pays where a token
is sent once to every device that has some of its experts (DeepEP), not where all tokens go everywhere (all-gather).
Experts that are active together then lie together, so that it may make a device busier.

`T` rows, `E` experts, `D` devices of `C = E / D` experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.artefacts.trace import Trace
from carpool.errors import CarpoolError
from carpool.placement.demand import chosen_TE
from carpool.placement.placement import Placement, from_devices, slots_for

ROUNDS = 200  # exchanges per layer at most, in units of experts
ROWS = 4096  # of the trace that exchanges are tried on
HEAVY = 1.25  # tokens that a device may have over its share, unless told otherwise


def fan_out(trace: Trace, devices: int, nodes: int = 1, *, max_load: float = HEAVY, seed: int = 0) -> Placement:
    """Few devices for a token's experts, none with more than `max_load` times its share of tokens.

    Objective: mean over rows and layers of the number of devices that hold a row's experts (hypergraph connectivity).
    Starts from greedy groups by co-activation, then exchanges pairs of experts of two devices while that helps
    (the best partner for each expert in turn). No guarantee; the bound is `ceil(K / C)`, one device where they fit.

    Args:
        max_load: of the busiest device over the mean; where experts in order have more already, that much is allowed.
        seed: of the rows that exchanges are tried on, and of the order of experts.

    Raises:
        CarpoolError: experts, devices or nodes that do not divide, or a `max_load` below 1.
    """
    slots = slots_for(trace.num_experts, devices, nodes)
    if max_load < 1:
        raise CarpoolError(f"max_load={max_load}: a device cannot have less than its share of tokens; give 1 or more")
    generator = torch.Generator().manual_seed(seed)
    placed = []
    for layer in range(trace.num_layers):
        chosen = chosen_TE(trace, layer)
        if len(chosen) > ROWS:
            chosen = chosen[torch.randperm(len(chosen), generator=generator)[:ROWS].sort().values]
        placed.append(_place(chosen, devices, max_load, generator))
    device_LE = torch.stack(placed)
    counts = [
        float(devices_TD(chosen_TE(trace, at), device_E, devices).sum(1).double().mean())
        for at, device_E in enumerate(device_LE)
    ]
    return Placement(
        from_devices(device_LE, devices), trace.num_experts, nodes, "fan-out",
        objective="devices that hold a token's experts, mean", value=sum(counts) / len(counts),
        bound=float(-(-trace.top_k // slots)), status="heuristic", seed=seed,
    )  # fmt: skip


def devices_TD(chosen: Tensor, device_E: Tensor, devices: int) -> Tensor:
    """Bool: which devices hold some of a row's experts, from bool `[T, E]`."""
    on_device_ED = torch.nn.functional.one_hot(device_E, devices).float()
    return chosen.float() @ on_device_ED > 0


def _place(chosen: Tensor, devices: int, max_load: float, generator: torch.Generator) -> Tensor:
    load_E = chosen.sum(0).double()
    share = float(load_E.sum()) / devices
    in_order_E = torch.arange(len(load_E)) // (len(load_E) // devices)
    most = max(max_load * share, float(_loads(load_E, in_order_E, devices).max()))
    starts = (in_order_E, _greedy(chosen, devices, most))
    found = [_exchange(chosen, start, load_E, devices, most, generator) for start in starts]
    return min(found, key=lambda device_E: int(devices_TD(chosen, device_E, devices).sum()))


def _loads(load_E: Tensor, device_E: Tensor, devices: int) -> Tensor:
    return torch.zeros(devices, dtype=torch.float64).scatter_add_(0, device_E, load_E)


def _greedy(chosen: Tensor, devices: int, most: float) -> Tensor:
    """Device by device: the busiest expert that is left, then again and again the one that is chosen most often with
    those there (of those that the load allows; the lightest where it allows none)."""
    num_experts = chosen.shape[1]
    slots = num_experts // devices
    load_E = chosen.sum(0).double()
    together_EE = (chosen.float().T @ chosen.float()).double()
    device_E = torch.full((num_experts,), -1, dtype=torch.int64)
    for device in range(devices):
        load = 0.0
        tie_E = torch.zeros(num_experts, dtype=torch.float64)
        for slot in range(slots):
            free_E = device_E < 0
            fits_E = free_E & (load_E + load <= most)
            score_E = load_E if slot == 0 else tie_E
            taken = int(score_E.masked_fill(~fits_E, -1.0).argmax()) if fits_E.any() else int(
                load_E.masked_fill(~free_E, torch.inf).argmin())  # fmt: skip
            device_E[taken] = device
            load += float(load_E[taken])
            tie_E = tie_E + together_EE[taken]
    return device_E


def _exchange(
    chosen: Tensor, device_E: Tensor, load_E: Tensor, devices: int, most: float, generator: torch.Generator
) -> Tensor:
    """Exchange experts of two devices while that lowers the number of devices that rows are sent to."""
    device_E = device_E.clone()
    num_experts = len(device_E)
    rows = chosen.float()
    held_TD = rows @ torch.nn.functional.one_hot(device_E, devices).float()  # how many of a row's experts lie there
    loads_D = _loads(load_E, device_E, devices)
    still = 0
    for turn in torch.randperm(num_experts, generator=generator).repeat(ROUNDS).tolist():
        if still == num_experts:
            break
        gain_E = _gains(rows, held_TD, device_E, turn)
        moved_E = load_E[turn] - load_E  # tokens that the other device gets more
        fits_E = loads_D[device_E] + moved_E <= torch.maximum(loads_D[device_E], torch.tensor(most))
        fits_E &= loads_D[device_E[turn]] - moved_E <= max(float(loads_D[device_E[turn]]), most)
        gain_E = gain_E.masked_fill(~fits_E | (device_E == device_E[turn]), 0)
        other = int(gain_E.argmax())
        still += 1
        if gain_E[other] < 1:
            continue
        still = 0
        for expert, target in ((turn, int(device_E[other])), (other, int(device_E[turn]))):
            held_TD[:, int(device_E[expert])] -= rows[:, expert]
            held_TD[:, target] += rows[:, expert]
            loads_D[int(device_E[expert])] -= load_E[expert]
            loads_D[target] += load_E[expert]
        device_E[turn], device_E[other] = device_E[other].clone(), device_E[turn].clone()
    return device_E


def _gains(rows: Tensor, held_TD: Tensor, device_E: Tensor, turn: int) -> Tensor:
    """How many fewer (row, device) pairs there are after expert `turn` changed places with each other one, `[E]`.

    A row loses device `p` if the leaving expert was its only one there and the coming one is none of its, and gains it
    the other way round; rows that choose both or neither of the two stay as they are.
    """
    here = device_E[turn]
    mine_T, here_T = rows[:, turn], held_TD[:, here]
    there_TE = held_TD[:, device_E]  # of a row, on the other's device
    only_mine_TE = mine_T.unsqueeze(1) * (1 - rows)
    only_other_TE = (1 - mine_T).unsqueeze(1) * rows
    mine_leaves_T = (here_T == 1).float()
    gain_TE = only_mine_TE * (mine_leaves_T.unsqueeze(1) - (there_TE == 0).float())
    gain_TE += only_other_TE * ((there_TE == 1).float() - (here_T == 0).float().unsqueeze(1))
    return gain_TE.sum(0)
