"""What a user wants to keep, as one number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from carpool.errors import CarpoolError


@dataclass(frozen=True)
class Target:
    """Exactly one of the three is set.

    Attributes:
        max_kl: largest KL(stock || policy), nats a decoded token.
        max_perplexity_ratio: largest perplexity over stock's.
        union: largest share of what stock reads, in (0, 1); the least KL under it is wanted.
    """

    max_kl: float | None = None
    max_perplexity_ratio: float | None = None
    union: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("max_kl", "max_perplexity_ratio", "union") if getattr(self, name) is not None]
        if len(given) != 1:
            raise CarpoolError("give one target: --max-kl, --max-perplexity-ratio or --union")
        value = getattr(self, given[0])
        low, high = {"max_kl": (0, math.inf), "max_perplexity_ratio": (1, math.inf), "union": (0, 1)}[given[0]]
        if not (math.isfinite(value) and low < value < high):
            limits = f"between {low} and {high}" if math.isfinite(high) else f"above {low}"
            raise CarpoolError(f"--{given[0].replace('_', '-')} {value}: give a number {limits}")

    @property
    def bounds_quality(self) -> bool:
        """Whether quality is bounded and reading minimised, and not the other way round."""
        return self.union is None

    def met(self, kl: float, perplexity_ratio: float, share: float) -> bool:
        """Whether a measurement satisfies it."""
        if self.max_kl is not None:
            return kl <= self.max_kl
        if self.max_perplexity_ratio is not None:
            return perplexity_ratio <= self.max_perplexity_ratio
        assert self.union is not None
        return share <= self.union

    def __str__(self) -> str:
        if self.max_kl is not None:
            return f"KL of at most {self.max_kl:g} nats a token"
        if self.max_perplexity_ratio is not None:
            return f"perplexity of at most {self.max_perplexity_ratio:g} times stock's"
        assert self.union is not None
        return f"at most {self.union:.0%} of what stock reads"
