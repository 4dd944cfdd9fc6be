"""XShare: a greedy budget on the gating mass of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from carpool.policies.base import Inputs, Policy
from carpool.policies.parameters import Number, require, require_count, require_within, resolve_budget
from carpool.policies.registry import register


@register
@dataclass(frozen=True)
class XShare(Policy):
    """Keep every voter's best experts, then fill the budget with the experts of largest total gating mass.

    Based on XShare (arXiv 2602.07265). The mass captured by a set is modular, so taking experts by their column
    sum is the exact optimum under a cardinality budget.

    Parameters:
        budget: size of the coreset; an int counts experts, a float in (0, 1] is a share of `E`. With a warm-up
            the coreset holds `max(budget, warm-up union)`. A quarter to a half of `E` is the useful range.
        warmup: each voter's best `warmup` experts are always kept. 1 is the paper's; 0 saves most at tight
            budgets but may take a token's best expert from it.
        utility: what is summed: `mass` (the paper), `squared` (weights squared, which tracks the error a removal
            causes more closely) or `topk_mass` (only over a row's native experts, as DES-Vote does).

    Reading of the paper: the gating score is the score the model mixes by, over all experts, before
    renormalisation; the warm-up counts towards the budget (Algorithm 1 fills the *remaining* budget).

    Identity: `budget=E` (or 1.0).

    Example: `xshare(budget=0.5)`.
    """

    budget: int | float | Tensor
    warmup: int | Tensor = 1
    utility: Literal["mass", "squared", "topk_mass"] = "mass"

    name = "xshare"
    paper = "XShare, arXiv 2602.07265"

    def __post_init__(self) -> None:
        require(
            self.utility in ("mass", "squared", "topk_mass"),
            f"utility={self.utility!r}: use 'mass', 'squared' or 'topk_mass'",
        )
        require_count("warmup", self.warmup, 0)

    def check(self, num_experts: int, top_k: int) -> None:
        resolve_budget("budget", self.budget, num_experts)
        require_within("warmup", self.warmup, top_k)

    def limit(self, num_experts: int, top_k: int) -> Number:
        return resolve_budget("budget", self.budget, num_experts)

    def coreset(self, inputs: Inputs) -> Tensor:
        """Bool `[G, E]`."""
        values_NE = inputs.weights_NE
        if self.utility == "squared":
            values_NE = values_NE.square()
        elif self.utility == "topk_mass":
            values_NE = inputs.native_weight_NE
        size = resolve_budget("budget", self.budget, inputs.num_experts)
        warm_GE = inputs.votes(inputs.rank_NE < self.warmup)
        return inputs.top_by_utility(inputs.utility(values_NE), size, warm_GE)
