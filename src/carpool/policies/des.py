"""DES: dynamic expert sharing inside a sequence or a block of a diffusion language model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from carpool.errors import CarpoolError
from carpool.policies.base import Inputs, Policy
from carpool.policies.oea import OEA
from carpool.policies.parameters import Number, require, resolve_budget
from carpool.policies.registry import register


@register
@dataclass(frozen=True)
class DESSeq(OEA):
    """The union of each token's best `k0` experts; every token then takes its full `K` inside it.

    Based on DES (arXiv 2602.00879), Algorithm 2. Grouped by batch this is OEA; the paper groups by the block of
    a diffusion language model (`group="block:32"`) or the sequence (`group="request"`).

    Parameters:
        k0: best experts of each voter. The paper uses 3 (safe) and 2 (aggressive) with K = 8.

    Identity: `k0=K`.

    Example: `des_seq(k0=2)`.
    """

    name = "des_seq"
    paper = "DES-Seq, arXiv 2602.00879"


@register
@dataclass(frozen=True)
class DESVote(Policy):
    """The experts with the largest sum of votes, where a token votes with its `K` native weights only.

    Based on DES (arXiv 2602.00879), Algorithm 3 and equation 6.

    Parameters:
        beta: size of the coreset as a share of the experts, `floor(beta * E)`. The paper uses 0.15 with 256
            experts and 0.6 with 64, about `4.75 * K` experts either way.
        size: the same as a number of experts; give one of the two. At least `K`.

    Reading of the paper: the votes are the weights after the activation (the fused kernel applies the softmax
    first), never raw logits; with a correction bias a token ranks with the bias and votes without it.

    Identity: `beta=1.0` or `size=E` (any size that holds the natural union).

    Example: `des_vote(beta=0.6)`.
    """

    beta: float | None = None
    size: int | Tensor | None = None

    name = "des_vote"
    paper = "DES-Vote, arXiv 2602.00879"

    def __post_init__(self) -> None:
        require((self.beta is None) != (self.size is None), "des_vote takes either beta=... or size=...")
        require(
            self.beta is None or (type(self.beta) is float and 0 < self.beta <= 1),
            f"beta={self.beta!r}: give a share of the experts, a float in (0, 1]",
        )
        require(
            self.size is None or isinstance(self.size, Tensor) or type(self.size) is int,
            f"size={self.size!r}: give a number of experts (beta=... takes a share)",
        )

    def check(self, num_experts: int, top_k: int) -> None:
        count = self.limit(num_experts, top_k)
        if not isinstance(count, Tensor) and count < top_k:
            given = f"beta={self.beta}" if self.size is None else f"size={self.size}"
            raise CarpoolError(f"des_vote {given} keeps {count} experts, fewer than the model's {top_k} per token")

    def limit(self, num_experts: int, top_k: int) -> Number:
        if self.size is not None:
            return resolve_budget("size", self.size, num_experts)
        return resolve_budget("beta", self.beta, num_experts)

    def coreset(self, inputs: Inputs) -> Tensor:
        """Bool `[G, E]`."""
        votes_GE = inputs.utility(inputs.native_weight_NE)
        return inputs.top_by_utility(votes_GE, self.limit(inputs.num_experts, inputs.top_k))
