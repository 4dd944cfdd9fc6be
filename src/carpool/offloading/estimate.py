"""Will a model fit, and how fast can it be at most? From numbers alone, before anything is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A model whose experts have some number of bits, in some memory beside some disk.

    Attributes:
        bits: of an expert's weight, scales included.
        expert: bytes of one. all_experts: of all layers. rest: of all other weights, which stay in memory.
        token: bytes of experts that one token reads.
        resident: share of the experts that fits beside the rest, 0 to 1; below 0 not even the rest does.
        disk: bytes a second.
    """

    bits: float
    expert: float
    all_experts: float
    rest: float
    token: float
    resident: float
    disk: float

    @classmethod
    def of(
        cls, bits: float, numbers: int, experts: int, layers: int, top_k: int, rest: float, memory: float, disk: float
    ) -> Estimate:
        """From a model's numbers: weights of an expert, experts of a layer, layers, experts a token."""
        expert = numbers * bits / 8
        whole = expert * experts * layers
        resident = min(1.0, (memory - rest) / whole)
        return cls(bits, expert, whole, rest, expert * top_k * layers, resident, disk)

    @property
    def fits(self) -> bool:
        return self.resident >= 1

    @property
    def runs(self) -> bool:
        """Whether memory holds what is read by every token, and one token's experts of a layer."""
        return self.resident > 0

    def most(self, hit_rate: float) -> float:
        """Tokens a second that the disk allows one sequence at a hit rate; infinite if nothing is missed."""
        missed = self.token * (1 - hit_rate)
        return self.disk / missed if missed > 0 else float("inf")
