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
        bytes: largest share of the bytes that stock reads, in (0, 1); the least KL under it is wanted.
    """

    max_kl: float | None = None
    max_perplexity_ratio: float | None = None
    bytes: float | None = None

    def __post_init__(self) -> None:
        if len(self.given) != 1:
            raise CarpoolError("give one target: --max-kl, --max-perplexity-ratio or --bytes")
        ((name, value),) = self.given.items()
        low, high = {"max_kl": (0, math.inf), "max_perplexity_ratio": (1, math.inf), "bytes": (0, 1)}[name]
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
        return self.bytes is None

    def met(self, kl: float, perplexity_ratio: float, share: float) -> bool:
        """Whether a measurement satisfies it."""
        if self.max_kl is not None:
            return kl <= self.max_kl
        if self.max_perplexity_ratio is not None:
            return perplexity_ratio <= self.max_perplexity_ratio
        assert self.bytes is not None
        return share <= self.bytes

    def __str__(self) -> str:
        if self.max_kl is not None:
            return f"KL of at most {self.max_kl:g} nats a token"
        if self.max_perplexity_ratio is not None:
            return f"perplexity of at most {self.max_perplexity_ratio:g} times stock's"
        assert self.bytes is not None
        return f"at most {self.bytes:.0%} of the bytes that stock reads"
