"""How tokens reach their experts' devices, and what of a placement each way pays for.

`N` rows, `K` experts per token, `D` devices on `M` nodes, `H` numbers of a hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.errors import CarpoolError


@dataclass(frozen=True)
class Dispatch:
    """One way.

    Attributes:
        name, about: for people.
        pays: what a placement can change there, in the words of `carpool.placement.score.Score`.
    """

    name: str
    about: str
    pays: tuple[str, ...]


BALANCE = ("peak_tokens", "peak_activated")
WAYS = {
    one.name: one
    for one in (
        Dispatch("allgather", "every device gets all tokens, results are reduced and scattered", BALANCE),
        Dispatch("deepep", "a token is sent once to each device that has some of its experts", (*BALANCE, "fan_out")),
        Dispatch("alltoall", "a token is sent once for each of its experts on other devices", BALANCE),
        Dispatch("coherent", "a token stays where its expert is (ExFlow; one expert a token)", (*BALANCE, "hops")),
    )
}  # fmt: skip


def way(name: str) -> Dispatch:
    """Raises CarpoolError for a name that is not in `WAYS`."""
    if name not in WAYS:
        raise CarpoolError(f"--dispatch {name}: use one of {', '.join(WAYS)}")
    return WAYS[name]


def on_ND(device_NK: Tensor, devices: int) -> Tensor:
    """Bool: which devices compute something for a row; a pair on device -1 is none."""
    on = torch.zeros(len(device_NK), devices + 1, dtype=torch.bool)
    return on.scatter_(1, device_NK + 1, True)[:, 1:]


def rows_sent(name: str, device_NK: Tensor, home_N: Tensor, devices: int) -> int:
    """Hidden states that leave their device on the way to the experts; as many come back (not with `coherent`).

    Args:
        device_NK: that computes each pair, -1: none. home_N: the device of each row.
    """
    if way(name).name == "allgather":
        return len(home_N) * (devices - 1)
    if name == "deepep":
        on = on_ND(device_NK, devices)
        return int(on.sum() - on.gather(1, home_N.unsqueeze(1)).sum())
    return int(((device_NK >= 0) & (device_NK != home_N.unsqueeze(1))).sum())


def nodes_sent(device_NK: Tensor, home_N: Tensor, devices: int, nodes: int) -> int:
    """Hidden states that leave their node, if a token is sent once to each node."""
    each = devices // nodes
    return rows_sent("deepep", torch.where(device_NK < 0, -1, device_NK // each), home_N // each, nodes)


def bounds(top_k: int, hidden_size: int, devices: int, token_bytes: int = 2) -> dict[str, tuple[float, float]]:
    """Least and most bytes per token and layer that leave a device, both ways together (EPS-MoE, arXiv 2410.12247,
    section 3, for evenly spread tokens).

    `tp`: all-reduce of experts that are split over all devices; `deepep`: all experts of a token at home, or on as many
    other devices as it has experts.
    """
    one = 2.0 * hidden_size * token_bytes
    everywhere = one * (devices - 1)
    most = one * min(top_k, devices - 1)
    return {
        "tp": (2 * one * (devices - 1) / devices,) * 2, "allgather": (everywhere,) * 2, "deepep": (0.0, most),
        "alltoall": (0.0, one * top_k),
    }  # fmt: skip
