"""Exact arithmetic on scores: sums that do not depend on the order of rows, and one rule for ties.

A float sum changes in its last bits with the order of its terms, and two experts may well tie (bf16 logits,
repeated prompts). Both would let the order of requests, or an expert's number, decide who is served by whom.
So every sum over rows is an int64 sum of fixed-point numbers, and every ranking sorts int64 keys whose lowest
bits hold a fixed pseudo-random order of the experts: keys never tie and low ids are not favoured.
"""

from __future__ import annotations

import torch
from torch import Tensor

FRACTION_BITS = 28  # of a fixed-point weight; weights are clamped to [0, 16)
TIE_BITS = 11  # up to 2,048 experts
MAX_EXPERTS = 1 << TIE_BITS
TIE_FACTOR, TIE_SHIFT = 1267, 761  # of the order that breaks ties
MAX_ROWS = 1 << 18  # 18 + 4 + 28 + 11 bits fit into a positive int64 with a bit to spare


def tie_order(num_experts: int, device: torch.device | str = "cpu") -> Tensor:
    """The fixed order `[E]` int64 that breaks ties, higher wins: distinct numbers spread over `0..2047`.

    An odd multiplier is a bijection modulo a power of two, and this one (near the golden section) scatters
    neighbours. The order depends on the expert's number alone, so all ranks and devices agree.
    """
    return (torch.arange(num_experts, device=device) * TIE_FACTOR + TIE_SHIFT) & (MAX_EXPERTS - 1)


def to_fixed(weights: Tensor) -> Tensor:
    """Non-negative weights as int64 fixed-point numbers (resolution `2**-28`, clamped to `[0, 16)`)."""
    return (weights.float().clamp(0.0, 15.99) * (1 << FRACTION_BITS)).to(torch.int64)


def ordered_int(scores: Tensor) -> Tensor:
    """Non-negative int64 numbers below `2**32` in the order of the float scores (finite, any sign; -0 equals 0)."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + (1 << 31)


def with_ties(keys_XE: Tensor) -> Tensor:
    """Distinct int64 keys: `keys_XE` (non-negative, below `2**52`) first, the tie order of the experts second."""
    return (keys_XE << TIE_BITS) | tie_order(keys_XE.shape[-1], keys_XE.device)


def rank_descending(keys_XE: Tensor, experts_E: Tensor) -> Tensor:
    """Rank of each entry in its row, 0 for the largest; the keys of a row must be distinct.

    Args:
        keys_XE: what to rank by. experts_E: the numbers 0 to `E - 1` on its device.
    """
    order_XE = keys_XE.argsort(dim=-1, descending=True)
    return order_XE.scatter(-1, order_XE, experts_E.expand_as(order_XE))  # every place is written
