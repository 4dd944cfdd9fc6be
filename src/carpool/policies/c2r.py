"""C2R: a token's other experts are chosen among those that are often chosen together with its best one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.policies.base import Inputs, Policy
from carpool.policies.parameters import require
from carpool.policies.registry import register


@register
@dataclass(frozen=True)
class C2R(Policy):
    """Keep each token's best expert, and take the others from the `partners` that text chooses most often with it.

    Based on C2R (arXiv 2504.01337): with experts that are chosen together on one device, a token goes to fewer devices.
    The paper fine-tunes the model for it (two epochs); here it is not, so what this costs is what the restriction alone
    costs. `carpool place` places experts by what they are chosen with.

    Parameters:
        partners: number of experts that may go with a token's best one, `K - 1` to `E - 1`; the paper's `T` is 30 of 60
            for Qwen1.5-MoE.

    Reading of the paper: weights are the model's own over what is chosen, renormalised where the model does. Partners
    go by counts, as in the released code, so that popular experts are everybody's partners; of equal counts the lower
    number comes first.

    Statistics: `coactivation [E, E]` (`carpool calibrate --energy`).

    Identity: `partners=E - 1`.

    Example: `c2r(partners=12)`.
    """

    partners: int

    name = "c2r"
    paper = "C2R, arXiv 2504.01337"
    kind = "token"
    needs = ("coactivation",)

    def __post_init__(self) -> None:
        require(type(self.partners) is int, f"partners={self.partners!r}: give a number of experts")

    def check(self, num_experts: int, top_k: int) -> None:
        low, high = max(1, top_k - 1), num_experts - 1
        require(
            low <= self.partners <= high,
            f"partners={self.partners}: a token's best expert needs {low} to {high} of the other experts beside it",
        )

    def prepare(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`partner [E, E]`, bool: the row's expert and those that may go with it.

        Raises:
            CarpoolError: counts that are no square matrix.
        """
        counts_EE = stats["coactivation"].double()
        require(
            counts_EE.dim() == 2 and counts_EE.shape[0] == counts_EE.shape[1],
            f"c2r: coactivation of shape {list(counts_EE.shape)}; calibrate again",
        )
        itself_EE = torch.eye(len(counts_EE), dtype=torch.bool, device=counts_EE.device)
        order_EE = counts_EE.masked_fill(itself_EE, torch.inf).argsort(dim=-1, descending=True, stable=True)
        return {"partner": order_EE.argsort(dim=-1) <= self.partners}

    def allowed(self, inputs: Inputs, coreset_GE: Tensor) -> Tensor:
        """Bool `[N, E]`."""
        return inputs.stats["partner"][inputs.preference_NE.argmax(-1)]
