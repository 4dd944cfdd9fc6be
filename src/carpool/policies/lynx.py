"""Lynx: the experts that most tokens of the batch ask for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.policies.base import Inputs, Policy
from carpool.policies.parameters import Number, resolve_budget
from carpool.policies.registry import register


@register
@dataclass(frozen=True)
class Lynx(Policy):
    """Keep the experts that the most voters natively pick, and every voter's best one.

    Based on Lynx (arXiv 2411.08982, first version): a token's best expert matters, the others are worth what their
    popularity in the batch says; the least popular ones are dropped and their tokens remapped.

    Parameters:
        budget: size of the coreset; an int counts experts, a float in (0, 1] is a share of `E`. The coreset holds
            `max(budget, union of the voters' best experts)`.

    Reading of the paper: the latency-first variant, with a fixed number of experts; remapping means that a token
    fills up to `K` from what is kept, in its own order of preference. Popularity counts tokens and ignores the
    weights, so ties are common at small batches; they go by the fixed tie rule.

    Identity: `budget=E` (or 1.0).

    Example: `lynx(budget=0.5)`.
    """

    budget: int | float | Tensor

    name = "lynx"
    paper = "Lynx, arXiv 2411.08982"

    def check(self, num_experts: int, top_k: int) -> None:
        resolve_budget("budget", self.budget, num_experts)

    def limit(self, num_experts: int, top_k: int) -> Number:
        return resolve_budget("budget", self.budget, num_experts)

    def coreset(self, inputs: Inputs) -> Tensor:
        """Bool `[G, E]`."""
        picks_GE = inputs.batch.group_sum((inputs.native_NE & inputs.voter_N1).to(torch.int64))
        best_GE = inputs.votes(inputs.rank_NE < 1)
        return inputs.top_by_utility(picks_GE, resolve_budget("budget", self.budget, inputs.num_experts), best_GE)
