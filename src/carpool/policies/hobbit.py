"""HOBBIT: the experts that weigh most in a token are read deep, the others shallow or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.policies.base import Inputs, Policy, drop
from carpool.policies.parameters import require
from carpool.policies.registry import register
from carpool.routing.spec import ALL_BITS, Routing


@register
@dataclass(frozen=True)
class Hobbit(Policy):
    """Read an expert deep where the experts that weigh more in a token leave much of its weight, else shallow.

    Based on HOBBIT (arXiv 2411.01433), its rule for what a missing expert is loaded with. Of a token's experts, sorted
    by weight, each has the score of what weighs more than it; up to `first` it is read with `high` bits, up to
    `second` with `low` bits, above that it is left out.

    Parameters:
        high: bits of a token's heaviest experts.
        low: bits of the ones after them.
        first: share of the token's weight up to which experts are read with `high` bits; the paper's for Mixtral.
        second: the same for `low` bits; 1 leaves none out.

    Reading of the paper: it decides for one token and for experts that are not resident; here for every pair, and an
    expert is read as deep as the pair of its group that asks for most.

    Example: `hobbit(high=4, low=2)`.

    Identity: `hobbit(high=16, low=16, second=1.0)`.
    """

    high: int
    low: int
    first: float = 0.6
    second: float = 0.9

    name = "hobbit"
    paper = "HOBBIT, arXiv 2411.01433"
    alone = True
    reads_depths = True

    def __post_init__(self) -> None:
        bits = all(type(one) is int for one in (self.high, self.low)) and 1 <= self.low <= self.high <= ALL_BITS
        require(bits, f"high={self.high!r}, low={self.low!r}: give bits from 1 to {ALL_BITS}, high the more")
        shares = all(type(one) in (int, float) for one in (self.first, self.second))
        require(
            shares and 0 <= self.first <= self.second <= 1,
            f"first={self.first!r}, second={self.second!r}: give shares of a token's weight, 0 to 1, in this order",
        )

    def required_stats(self) -> tuple[str, ...]:
        return ("planes_shape",)

    def prepare(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`deepest []`; raises CarpoolError for bits that are not stored."""
        stored = [*stats["planes_shape"][3:].tolist(), ALL_BITS]
        for bits in (self.high, self.low):
            require(
                bits in stored, f"hobbit: experts are stored at {stored[:-1]} bits, not at {bits}; use one of these"
            )
        return {"deepest": torch.tensor(self.high, device=stats["planes_shape"].device)}

    def read_depth(self, inputs: Inputs) -> Tensor:
        """Int64 `[G, E]`; the heaviest expert of a voter is always read."""
        ids_NK = inputs.native_ids_NK.long()
        share_NK = inputs.native_share_NE.gather(-1, ids_NK)
        heavier_NK = (share_NK.unsqueeze(-2) * (share_NK.unsqueeze(-2) > share_NK.unsqueeze(-1))).sum(-1)
        none_NE = torch.zeros_like(inputs.native_NE)
        deep_GE = inputs.votes(none_NE.scatter(-1, ids_NK, heavier_NK <= self.first))
        if self.second >= 1:  # nothing is left out: what nobody here picks others may read
            return torch.where(deep_GE, self.high, torch.full_like(deep_GE, self.low, dtype=torch.int64))
        read_GE = inputs.votes(none_NE.scatter(-1, ids_NK, heavier_NK <= self.second))
        return torch.where(deep_GE, self.high, read_GE * self.low)

    def assign(self, inputs: Inputs, allowed_NE: Tensor, coreset_GE: Tensor) -> Routing:
        """A token's native experts that are read; the others are left out."""
        return drop(inputs, allowed_NE)
