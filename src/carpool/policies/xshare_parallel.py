"""XShare under expert parallelism: a budget for each device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from carpool.errors import CarpoolError
from carpool.policies.base import Inputs, Policy
from carpool.policies.parameters import A_HAIR, require, require_count, require_within, resolve_budget
from carpool.policies.registry import register


@register
@dataclass(frozen=True)
class XShareExpertParallel(Policy):
    """Keep every voter's best experts, then fill each device's budget with its experts of largest gating mass.

    Based on XShare (arXiv 2602.07265), for experts spread over devices: a layer takes as long as its busiest device,
    so the number of experts is capped per device. The caps are independent and the captured mass is modular, so
    taking each device's experts by their column sum is the exact optimum.

    Parameters:
        budget_per_device: experts of one device in the coreset; an int counts them, a float in (0, 1] is a share of
            what the device holds, at least one.
        warmup: each voter's best `warmup` experts are always kept. They count towards the cap of their device and
            may exceed it: the peak is `max(cap, warm-up experts of the device)`. 0 makes the cap strict.

    Needs: `Batch.device_E`, the device of each expert. In transformers a model that is loaded with expert parallelism
    says it, and `carpool evaluate --devices` supposes it; elsewhere set the batch of the run yourself.

    Reading of the paper: the warm-up counts towards the budget, as in XShare without devices; a global budget that
    always goes to the least loaded device reaches the same set.

    Identity: `budget_per_device=1.0`, or the number of experts of the fullest device.

    Example: `xshare_expert_parallel(budget_per_device=0.5)`.
    """

    budget_per_device: int | float | Tensor
    warmup: int | Tensor = 1

    name = "xshare_expert_parallel"
    paper = "XShare, arXiv 2602.07265"

    def __post_init__(self) -> None:
        require_count("warmup", self.warmup, 0)

    def check(self, num_experts: int, top_k: int) -> None:
        if not isinstance(self.budget_per_device, float):
            resolve_budget("budget_per_device", self.budget_per_device, num_experts)
        else:
            require(
                0 < self.budget_per_device <= 1,
                f"budget_per_device={self.budget_per_device!r}: a float is a share of a device's experts, in (0, 1]",
            )
        require_within("warmup", self.warmup, top_k)

    def coreset(self, inputs: Inputs) -> Tensor:
        """Bool `[G, E]`."""
        device_E = inputs.batch.device_E
        if device_E is None:
            raise CarpoolError(
                "xshare_expert_parallel needs the device of each expert, which this run does not have; "
                "use xshare(budget=...) without expert parallelism, or carpool evaluate --devices"
            )
        cap: int | Tensor
        if isinstance(self.budget_per_device, float):
            same_EE = device_E.unsqueeze(0) == device_E.unsqueeze(1)
            cap = (same_EE.sum(-1).double() * self.budget_per_device + A_HAIR).long().clamp_min(1)
        else:
            cap = self.budget_per_device
        warm_GE = inputs.votes(inputs.rank_NE < self.warmup)
        rank_GE = inputs.utility_rank(inputs.utility(inputs.weights_NE), warm_GE)
        return (_rank_within(rank_GE, device_E, inputs.num_experts) < cap) | warm_GE


def _rank_within(rank_GE: Tensor, device_E: Tensor, num_experts: int) -> Tensor:
    """Rank of each expert among those of its device, 0 first, from its rank among all."""
    by_device_GE = (device_E * num_experts + rank_GE).argsort(-1).argsort(-1)
    earlier_E = (device_E.unsqueeze(0) < device_E.unsqueeze(1)).sum(-1)  # experts of devices with a smaller number
    return by_device_GE - earlier_E
