"""Exact arithmetic on scores: sums and rankings that do not depend on the order of rows.

A float sum changes in its last bits with the order of its terms, and two experts may well tie (bf16 logits,
repeated prompts). Both would let the order of requests, or an expert's number, decide who is served by whom.
So every sum over rows is an int64 sum of fixed-point numbers, and every ranking sorts distinct int64 keys
(`routing.keys`).
"""

from __future__ import annotations

import torch
from torch import Tensor

FRACTION_BITS = 28  # of a fixed-point weight
WHOLE_BITS = 4  # weights are clamped to [0, 16)
ROW_BITS = 18
MAX_ROWS = 1 << ROW_BITS
SUM_BITS = ROW_BITS + WHOLE_BITS + FRACTION_BITS  # of a sum over rows
ORDERED_BITS = 32  # of `ordered_int`


def to_fixed(weights: Tensor) -> Tensor:
    """Non-negative weights as int64 fixed-point numbers (resolution `2**-28`, clamped to `[0, 16)`)."""
    return (weights.float().clamp(0.0, 15.99) * (1 << FRACTION_BITS)).to(torch.int64)


def ordered_int(scores: Tensor) -> Tensor:
    """Non-negative int64 numbers below `2**32` in the order of the float scores (finite, any sign; -0 equals 0)."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + (1 << 31)


def rank_descending(keys_XE: Tensor, experts_E: Tensor) -> Tensor:
    """Rank of each entry in its row, 0 for the largest; the keys of a row must be distinct.

    Args:
        keys_XE: what to rank by. experts_E: the numbers 0 to `E - 1` on its device.
    """
    order_XE = keys_XE.argsort(dim=-1, descending=True)
    return order_XE.scatter(-1, order_XE, experts_E.expand_as(order_XE))  # every place is written
