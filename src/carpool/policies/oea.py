"""OEA: opportunistic expert activation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from carpool.policies.base import Inputs, Policy
from carpool.policies.parameters import require_count, require_within
from carpool.policies.registry import register


@register
@dataclass(frozen=True)
class OEA(Policy):
    """Load each voter's best `k0` experts; everyone fills up to `K` from what is loaded ("piggybacking").

    Based on OEA (arXiv 2511.02237), the simplified Algorithm 1 that the paper recommends.

    Parameters:
        k0: best experts of each voter that are loaded; the coreset is their union. The paper finds `k0 = K/2`
            near lossless on Qwen3-30B (K 8, batch 16) and 3 usable.

    Reading of the paper: the general algorithm's test admits one expert too many as printed; the text bounds the
    row at exactly `K`, which is implemented.

    Identity: `k0=K`.

    Example: `oea(k0=2)`.
    """

    k0: int | Tensor

    name = "oea"
    paper = "OEA, arXiv 2511.02237"

    def __post_init__(self) -> None:
        require_count("k0", self.k0, 1)

    def check(self, num_experts: int, top_k: int) -> None:
        require_within("k0", self.k0, top_k)

    def coreset(self, inputs: Inputs) -> Tensor:
        """Bool `[G, E]`."""
        return inputs.votes(inputs.rank_NE < self.k0)
