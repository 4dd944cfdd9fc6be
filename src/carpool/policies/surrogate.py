"""Surrogates for displaced experts: what is not read is foreseen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from carpool.policies.base import Inputs, Policy, backfill, leave
from carpool.policies.parameters import Number, require, require_count, require_within, resolve_budget  # fmt: skip
from carpool.policies.registry import register
from carpool.routing.spec import Routing


@register
@dataclass(frozen=True)
class Surrogate(Policy):
    """Keep the experts that are hard to foresee, and leave what is displaced to a small linear map of each expert.

    Carpool's own method. A row's native expert `e` outside the coreset is not replaced by another expert: its
    *surrogate*, a linear map of low rank fitted to the expert's outputs, stands in for it with the weight that the
    router gave `e`. The row then loses `w * (E_e(x) - surrogate_e(x))`, whose squared length is about
    `w^2 * energy_e * unexplained_e`. Summed over rows that is modular in the coreset, so keeping the experts with the
    largest column sums is the best choice under a budget.

    Parameters:
        budget: size of the coreset; an int counts experts, a float in (0, 1] is a share of `E`. With a warm-up the
            coreset holds `max(budget, warm-up union)`.
        warmup: each voter's best `warmup` experts are always kept. With surrogates this gains nothing on the reference
            model, and it keeps tight budgets out of reach.
        select: what an expert's absence costs: `loss` (`w^2` times the energy that its surrogate leaves unexplained),
            `energy` (`w^2` times all its energy) or `squared` (`w^2`). `w` is the share of the row's native weight.
        least: a surrogate that explains a smaller share of its expert's energy is not used; the pairs of that expert
            are filled up from the coreset instead. Above 1 no surrogate is used (plain backfill, for comparison).

    Statistics: `surrogate_energy [E]`, mean squared length of an expert's output; `surrogate_unexplained [E]`, the
    share of it that the surrogate leaves, both on tokens that the fit did not see. The host reads the surrogates
    themselves and adds their output beside the experts' (`carpool.experts.surrogates`).

    Identity: `budget=E` (or 1.0).

    Example: `surrogate(budget=0.25)`.
    """

    budget: int | float | Tensor
    warmup: int | Tensor = 0
    select: Literal["loss", "energy", "squared"] = "loss"
    least: float = 0.0

    name = "surrogate"
    paper = "Carpool's own: coreset and surrogates"
    needs = ("surrogate_energy", "surrogate_unexplained")

    def __post_init__(self) -> None:
        require(
            self.select in ("loss", "energy", "squared"), f"select={self.select!r}: use 'loss', 'energy' or 'squared'"
        )
        require_count("warmup", self.warmup, 0)
        good = type(self.least) in (int, float) and self.least >= 0
        require(good, f"least={self.least!r}: give the share of energy that a surrogate must explain, 0 or more")

    @property
    def surrogates(self) -> bool:
        return self.least <= 1

    def check(self, num_experts: int, top_k: int) -> None:
        resolve_budget("budget", self.budget, num_experts)
        require_within("warmup", self.warmup, top_k)

    def limit(self, num_experts: int, top_k: int) -> Number:
        return resolve_budget("budget", self.budget, num_experts)

    def prepare(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`cost [E]`, of a displaced pair of weight 1, relative to the layer's largest energy; `expected_loss [E]`, the
        share of it that the surrogate leaves; `left [E]`, experts whose surrogates are used."""
        energy_E, unexplained_E = (stats[name].float() for name in self.needs)
        require(
            energy_E.dim() == 1 and energy_E.shape == unexplained_E.shape,
            f"surrogate: energies {list(energy_E.shape)} and unexplained shares {list(unexplained_E.shape)}; expected "
            "[experts] each",
        )
        left_E = unexplained_E < 1 - self.least if self.least > 0 else unexplained_E < 1
        loss_E = torch.where(left_E, unexplained_E.clamp(0, 1), 1.0)
        cost_E = torch.ones_like(energy_E)
        if self.select != "squared":
            cost_E = energy_E / energy_E.amax().clamp_min(1e-30)
        cost_E = cost_E * loss_E if self.select == "loss" else cost_E
        return {"cost": cost_E, "expected_loss": loss_E, "left": left_E}

    def coreset(self, inputs: Inputs) -> Tensor:
        """Bool `[G, E]`."""
        weight_NE = inputs.native_weight_NE
        # summed in float64, or its last bits would depend on who adds
        total_N1 = weight_NE.sum(-1, keepdim=True, dtype=torch.float64).float()
        share_NE = weight_NE / total_N1.clamp_min(1e-30)
        size = resolve_budget("budget", self.budget, inputs.num_experts)
        warm_GE = inputs.votes(inputs.rank_NE < self.warmup)
        return inputs.top_by_utility(inputs.utility(share_NE.square() * inputs.stats["cost"]), size, warm_GE)

    def expected_loss(self, inputs: Inputs) -> Tensor:
        """`[E]`."""
        return inputs.stats["expected_loss"]

    def assign(self, inputs: Inputs, allowed_NE: Tensor, coreset_GE: Tensor) -> Routing:
        """The model's own rule over what is allowed and what surrogates stand in for."""
        if not self.surrogates:
            return backfill(inputs, allowed_NE)
        return leave(inputs, allowed_NE, inputs.native_NE & inputs.stats["left"])
