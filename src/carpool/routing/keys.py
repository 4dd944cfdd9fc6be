"""Int64 keys that rank experts: fields side by side, so that one comparison of integers settles all of them.

    of a row's expert       native 1 | in the model's groups 1 | score 32 | tie 11     (`preference_keys`)
    of a group's expert     tier 2 | summed utility 50 | tie 11                        (`utility_keys`)

The tie field, always the lowest, holds a fixed pseudo-random order of the experts: keys of a row or group never tie,
and low ids are not favoured.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from carpool.routing.exact import ORDERED_BITS, SUM_BITS, ordered_int

TIE_FACTOR, TIE_SHIFT = 1267, 761  # an odd factor is a bijection modulo a power of two, this one scatters neighbours


@dataclass(frozen=True)
class Field:
    """Bits of a key.

    Attributes:
        shift: the lowest of them. width: their number.
    """

    shift: int
    width: int

    @property
    def unit(self) -> int:
        """What the field's 1 adds to a key."""
        return 1 << self.shift

    @property
    def end(self) -> int:
        """The bit above the field."""
        return self.shift + self.width

    def of(self, keys: Tensor) -> Tensor:
        """The field of some keys."""
        return (keys >> self.shift) & ((1 << self.width) - 1)


def side_by_side(*widths: int) -> tuple[Field, ...]:
    """Fields from bit 0 on; together they leave a key positive."""
    ends = list(accumulate(widths))
    assert ends[-1] <= 63, f"{ends[-1]} bits in an int64 key"
    return tuple(Field(end - width, width) for end, width in zip(ends, widths, strict=True))


TIE, SCORE, KEPT, NATIVE = side_by_side(11, ORDERED_BITS, 1, 1)
UTILITY, TIER = side_by_side(TIE.width, SUM_BITS, 2)[1:]
MAX_EXPERTS = 1 << TIE.width
BLOCK = 1 << NATIVE.end  # above every key of a row: a key less this is negative, in the order of the others


def tie_order(num_experts: int, device: torch.device | str = "cpu") -> Tensor:
    """The fixed order `[E]` int64 that breaks ties, higher wins: distinct numbers spread over `0..2047`.

    The order depends on the expert's number alone, so all ranks and devices agree.
    """
    return (torch.arange(num_experts, device=device) * TIE_FACTOR + TIE_SHIFT) & (MAX_EXPERTS - 1)


def with_ties(values_XE: Tensor) -> Tensor:
    """Distinct int64 keys: `values_XE` (non-negative, below `2**52`) first, the tie order of the experts second."""
    return (values_XE << TIE.width) | tie_order(values_XE.shape[-1], values_XE.device)


def preference_keys(scores_NE: Tensor, kept_NE: Tensor | None, native_ids_NK: Tensor) -> Tensor:
    """Each row's order of preference as distinct non-negative keys `[N, E]`, the largest first: its native experts,
    then those in the model's allowed expert groups, then the rest; by score within each.

    Args:
        scores_NE: finite. kept_NE: experts of the groups that a row may use; None without such a limit.
        native_ids_NK: int64.
    """
    values_NE = ordered_int(scores_NE)
    if kept_NE is not None:
        values_NE = values_NE | (kept_NE.to(torch.int64) << KEPT.shift - TIE.width)
    keys_NE = with_ties(values_NE)
    return keys_NE.scatter(-1, native_ids_NK, keys_NE.gather(-1, native_ids_NK) | NATIVE.unit)


def utility_keys(utility_GE: Tensor, tier_GE: Tensor) -> Tensor:
    """A group's experts as distinct non-negative keys `[G, E]`, the largest first: by tier, then by utility.

    Args:
        utility_GE: int64, sums over rows of fixed-point numbers. tier_GE: int64, 0 to 3.
    """
    return with_ties(utility_GE + (tier_GE << TIER.shift - TIE.width))
