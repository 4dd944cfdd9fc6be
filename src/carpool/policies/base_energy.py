"""BASE: keep the experts whose removal would cost the batch the most output energy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.policies.base import Inputs, Policy
from carpool.policies.parameters import Number, require, resolve_budget
from carpool.policies.registry import register

MAX_ENERGY = 1e12  # keeps an outlier's prediction finite, so that 0 times it is 0


@register
@dataclass(frozen=True)
class BASE(Policy):
    """Keep the experts with the largest sum of squared weight times predicted squared output norm.

    Based on BASE (arXiv 2609.36222). Removing expert `e` takes `w * E_e(x)` from each token that picks it; the sum
    of the squared lengths is what the removal costs. The length of the output is not known before the expert runs,
    so a linear function of the router's input predicts its logarithm.

    Parameters:
        budget: size of the coreset; an int counts experts, a float in (0, 1] is a share of `E`. Meant for tight
            budgets, where gate weights alone choose worst.

    Statistics: `norm_weight [E, H]` and `norm_bias [E]`, the predictor of `log ||E_e(x)||` (natural logarithm, `x`
    the router's input as it is); `norm_scale` (0-d), the logarithm of a large output norm of the layer. Energies are
    relative to it: an output of that norm at weight 1 counts 1, the resolution is `2**-28`, and 16 is the most.

    Reading of the paper: the weight is the score the model mixes by, before renormalisation; only rows that natively
    pick an expert count for it.

    Identity: `budget=E` (any budget that holds the natural union).

    Example: `base(budget=0.5)`.
    """

    budget: int | float | Tensor

    name = "base"
    paper = "BASE, arXiv 2609.36222"
    needs = ("norm_weight", "norm_bias", "norm_scale")
    needs_hidden = True

    def check(self, num_experts: int, top_k: int) -> None:
        resolve_budget("budget", self.budget, num_experts)

    def limit(self, num_experts: int, top_k: int) -> Number:
        return resolve_budget("budget", self.budget, num_experts)

    def prepare(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`energy_weight [H, E]` and `energy_bias [E]`: the predictor of the relative energy's logarithm."""
        weight_EH, bias_E, scale = (stats[name].float() for name in self.needs)
        require(
            weight_EH.dim() == 2 and bias_E.shape == weight_EH.shape[:1] and scale.dim() == 0,
            f"base: a predictor with weight {list(weight_EH.shape)}, bias {list(bias_E.shape)} and scale "
            f"{list(scale.shape)}; expected [experts, hidden], [experts] and []",
        )
        return {"energy_weight": 2 * weight_EH.T.contiguous(), "energy_bias": 2 * (bias_E - scale)}

    def coreset(self, inputs: Inputs) -> Tensor:
        """Bool `[G, E]`."""
        energy_NE = self.energy_NE(inputs.hidden_NH, inputs.stats).clamp_max(MAX_ENERGY)
        energy_NE = energy_NE * self.weight_NE(inputs).square()
        size = resolve_budget("budget", self.budget, inputs.num_experts)
        return inputs.top_by_utility(inputs.utility(energy_NE), size)

    def weight_NE(self, inputs: Inputs) -> Tensor:
        """Each row's weight of its native experts, before renormalisation; 0 elsewhere."""
        return inputs.native_weight_NE

    @staticmethod
    def energy_NE(hidden_NH: Tensor | None, stats: Mapping[str, Tensor]) -> Tensor:
        """Predicted relative energy of every expert's output, `[N, E]` float32; what overflows is infinite."""
        if hidden_NH is None:
            raise CarpoolError("base needs the router's input; this host does not hand it on")
        # one matrix product in float32: like the router's logits, its last bits may depend on the number of rows
        return torch.addmm(stats["energy_bias"], hidden_NH.float(), stats["energy_weight"]).exp()
