"""Which replica of an expert computes a row: the rules of engines, and METRO's.

`N` rows, `K` experts per token, `D` devices, `E` experts, `X` steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.placement.metro import fewest_activated

RULES = ("hash", "metro")
KNUTH = 2654435769  # floor(2^32 / phi)


def device_NK(
    ids_NK: Tensor, asked_NK: Tensor, holds_DE: Tensor, step_N: Tensor, row_N: Tensor, rule: str = "hash"
) -> Tensor:
    """The device that computes each (row, expert) pair, int64; -1 for pairs that are not asked for.

    Args:
        ids_NK: experts. asked_NK: bool, which of them are computed.
        step_N: number of the row's step, from 0 on. row_N: the row's place in its step.
        rule: `hash`: a hash of the row's place picks a replica, as vLLM does; `metro`: every expert of a step is
            computed on one device, chosen so that none computes many.

    Raises:
        CarpoolError: an unknown rule, an expert that no device holds.
    """
    if rule not in RULES:
        raise CarpoolError(f"replicas chosen by {rule!r}: use {' or '.join(RULES)}")
    num_experts = holds_DE.shape[1]
    if rule == "metro":
        active_XE = torch.zeros(int(step_N.max()) + 1, num_experts, dtype=torch.bool)
        step_NK = step_N.unsqueeze(1).expand_as(ids_NK)
        active_XE[step_NK[asked_NK], ids_NK[asked_NK]] = True
        device = fewest_activated(active_XE, holds_DE)[step_NK, ids_NK]
    else:
        replicas_E = holds_DE.sum(0)
        if (replicas_E == 0).any():
            raise CarpoolError(f"no device holds expert {int((replicas_E == 0).nonzero()[0])}")
        holder_ED = holds_DE.int().T.argsort(dim=-1, descending=True, stable=True)  # of each expert, its devices first
        turn_N1 = ((row_N.long() * KNUTH) & 0xFFFFFFFF).unsqueeze(1)
        device = holder_ED[ids_NK, turn_N1 % replicas_E[ids_NK]]
    return torch.where(asked_NK, device, -1)
