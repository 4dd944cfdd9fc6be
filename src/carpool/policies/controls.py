"""Controls: what every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.policies.base import Inputs, Number, Policy, drop, require, require_count, require_within, resolve_budget
from carpool.policies.registry import register
from carpool.routing.spec import Routing


@register
@dataclass(frozen=True)
class TopK(Policy):
    """Fewer experts per token: each row keeps its best `k` native experts.

    What a model with a smaller `num_experts_per_tok` does. Saves pairs, and union only as far as tokens agree.

    Parameters:
        k: experts per token, 1 to `K`.

    Identity: `k=K`.
    """

    k: int | Tensor

    name = "topk"
    paper = "control: fewer experts per token"
    kind = "token"

    def __post_init__(self) -> None:
        require_count("k", self.k, 1)

    def check(self, num_experts: int, top_k: int) -> None:
        require_within("k", self.k, top_k)

    def allowed(self, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        """Bool `[N, E]`."""
        return inputs.rank_NE < self.k

    def assign(self, inputs: Inputs, allowed_NE: Tensor, coreset_GE: Tensor) -> Routing:
        return drop(inputs, allowed_NE)


@register
@dataclass(frozen=True)
class RandomCoreset(Policy):
    """A random coreset: `budget` experts drawn from those that the group's voters natively pick.

    The control for every coreset method: what does choosing well add to choosing at all? The draw is a hash of
    the group's own column sums, so it changes with every layer and step, needs no generator state, and does not
    depend on the order of the rows.

    Parameters:
        budget: size of the coreset; an int counts experts, a float in (0, 1] is a share of `E`.
        seed: another draw.

    Identity: `budget=E` (any budget that holds the natural union).
    """

    budget: int | float | Tensor
    seed: int = 0

    name = "random"
    paper = "control: random coreset of equal size"

    def __post_init__(self) -> None:
        require(type(self.seed) is int and abs(self.seed) < 2**53, f"seed={self.seed!r}: give an int below 2**53")

    def check(self, num_experts: int, top_k: int) -> None:
        resolve_budget("budget", self.budget, num_experts)

    def limit(self, num_experts: int, top_k: int) -> Number:
        return resolve_budget("budget", self.budget, num_experts)

    def coreset(self, inputs: Inputs) -> Tensor:
        """Bool `[G, E]`."""
        sums_GE = inputs.utility(inputs.weights_NE)
        # number times 0x9E3779B97F4A7C1 modulo 2**64, in two parts: compilers do not wrap the product of a range
        high, low, count = 0x9E3779B, 0x97F4A7C1, inputs.num_experts + 1
        high_E = torch.arange(high, high * count, high, device=sums_GE.device) << 32
        experts_E = high_E + torch.arange(low + self.seed, low * count + self.seed, low, device=sums_GE.device)
        mixed_GE = (sums_GE.sum(-1, keepdim=True) ^ experts_E) * 0x2545F4914F6CDD1D
        draw_GE = ((mixed_GE ^ (mixed_GE >> 29)) * 0x1B03738712FAD5C9 >> 24) & ((1 << 40) - 1)
        natural_GE = inputs.votes(inputs.native_NE)
        size = resolve_budget("budget", self.budget, inputs.num_experts)
        return inputs.top_by_utility(draw_GE * natural_GE, size)
