"""Controls: what every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from carpool.policies.base import Inputs, Policy, drop
from carpool.policies.parameters import Number, require, require_count, require_within, resolve_budget
from carpool.policies.registry import register
from carpool.routing.exact import SUM_BITS
from carpool.routing.keys import TIE, side_by_side
from carpool.routing.spec import Routing

CONTROLS = ("topk", "random")


@register
@dataclass(frozen=True)
class TopK(Policy):
    """Fewer experts per token: each row keeps its best `k` native experts.

    What a model with a smaller `num_experts_per_tok` does. Saves pairs, and union only as far as tokens agree.

    Parameters:
        k: experts per token, 1 to `K`.

    Identity: `k=K`.

    Example: `topk(k=4)`.
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
    """A random coreset: each voter's best experts, and others drawn from those that the group's voters natively pick.

    The control for every coreset method: what does choosing well add to choosing at all? The draw is a hash of
    the group's own column sums, so it changes with every layer and step, needs no generator state, and does not
    depend on the order of the rows. (A batch that comes again, bit for bit, is drawn the same again.)

    Parameters:
        budget: size of the coreset; an int counts experts, a float in (0, 1] is a share of `E`. With a warm-up
            the coreset holds `max(budget, warm-up union)`.
        warmup: each voter's best `warmup` experts are always kept. 1 is the fair control for methods that keep them,
            which is worth more than all that they choose beyond it; 0 for those that do not.
        seed: another draw.

    Identity: `budget=E` (any budget that holds the natural union).

    Example: `random(budget=0.5)`.
    """

    budget: int | float | Tensor
    warmup: int | Tensor = 1
    seed: int = 0

    name = "random"
    paper = "control: random coreset of equal size"

    def __post_init__(self) -> None:
        require(type(self.seed) is int and abs(self.seed) < 2**53, f"seed={self.seed!r}: give an int below 2**53")
        require_count("warmup", self.warmup, 0)

    def check(self, num_experts: int, top_k: int) -> None:
        resolve_budget("budget", self.budget, num_experts)
        require_within("warmup", self.warmup, top_k)

    def limit(self, num_experts: int, top_k: int) -> Number:
        return resolve_budget("budget", self.budget, num_experts)

    def coreset(self, inputs: Inputs) -> Tensor:
        """Bool `[G, E]`."""
        draw_GE = _draw(inputs.utility(inputs.weights_NE), inputs.experts_E, self.seed)
        natural_GE = inputs.votes(inputs.native_NE) * DRAW
        warm_GE = inputs.votes(inputs.rank_NE < self.warmup)
        size = resolve_budget("budget", self.budget, inputs.num_experts)
        return inputs.top_by_utility(draw_GE & natural_GE, size, warm_GE)


DRAW = (1 << 40) - 1  # bits of a draw
_, EXPERT = side_by_side(SUM_BITS + 1, TIE.width)  # what is hashed: a sum, and above it the expert's number


def _draw(sums_GE: Tensor, experts_E: Tensor, seed: int) -> Tensor:
    """For every group and expert a number whose lowest 40 bits look random: a hash of all sums of the group, the
    expert's number and the seed. Products wrap at 64 bits; none is of a range, which compilers do not wrap."""
    own_GE = (sums_GE | (experts_E << EXPERT.shift)) * odd(2 * seed)
    own_GE = own_GE ^ (own_GE >> 32)
    return ((own_GE ^ own_GE.sum(-1, keepdim=True)) * odd(2 * seed + 1)) >> 24


def odd(number: int) -> int:
    """An odd multiplier that a number stands for, as a signed 64-bit integer: SplitMix64's finaliser."""
    bits = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64 | 1
    return bits - (bits >> 63 << 64)
