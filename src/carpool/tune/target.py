"""What a user wants to keep, as one number."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

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
        if len(self.given) != 1:
            raise CarpoolError("give one target: --max-kl, --max-perplexity-ratio or --union")
        ((name, value),) = self.given.items()
        low, high = {"max_kl": (0, math.inf), "max_perplexity_ratio": (1, math.inf), "union": (0, 1)}[name]
        if not (math.isfinite(value) and low < value < high):
            limits = f"between {low} and {high}" if math.isfinite(high) else f"above {low}"
            raise CarpoolError(f"--{name.replace('_', '-')} {value}: give a number {limits}")

    @property
    def given(self) -> dict[str, float]:
        """Name and value of what is set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

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

    def room(self, kl: float, perplexity_ratio: float, share: float) -> float:
        """What is bounded may grow by this factor; 1 where a measurement does not say."""
        if self.max_kl is not None:
            return self.max_kl / kl if kl > 0 else 1.0
        if self.max_perplexity_ratio is not None:
            lost = perplexity_ratio - 1  # grows with the KL
            return (self.max_perplexity_ratio - 1) / lost if lost > 0 else 1.0
        assert self.union is not None
        return self.union / share

    def __str__(self) -> str:
        if self.max_kl is not None:
            return f"KL of at most {self.max_kl:g} nats a token"
        if self.max_perplexity_ratio is not None:
            return f"perplexity of at most {self.max_perplexity_ratio:g} times stock's"
        assert self.union is not None
        return f"at most {self.union:.0%} of what stock reads"
