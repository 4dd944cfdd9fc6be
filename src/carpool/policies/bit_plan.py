"""MC's bit plan: how many bits each expert has is settled by calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from carpool.policies.base import Inputs, Policy
from carpool.policies.depth_prices import deep_outliers
from carpool.policies.parameters import require
from carpool.policies.registry import register

SHORT = 1e-9


@register
@dataclass(frozen=True)
class BitPlan(Policy):
    """Give every expert of a layer a number of bits for good, so that what calibration expects to be lost is least.

    Based on MC (arXiv 2410.06270), its pre-loading mixed-precision quantisation: with `f` the share of tokens that pick
    an expert, `w` the share of the router's weight that it gets, and `e_b` what the layer's output loses (Frobenius
    norm) if this expert alone has `b` bits,

        minimise  sum f^alpha w^beta e_b^gamma    with `bits` bits an expert on average,

    and, where both are offered, at least one expert with 2 and one with 3 bits. Solved exactly by dynamic programming.

    Parameters:
        bits: mean bits of a weight, scales not counted.
        levels: bits that an expert may have; default: all that are stored.
        alpha: power of the share of tokens.
        beta: power of the share of weight.
        gamma: power of the loss. `alpha=0, beta=0, gamma=2` minimises the lost energy itself.
        importance: `sum` weighs the loss by `alpha f + beta w` in place of `f^alpha w^beta` (MC#, arXiv 2510.10962).

    Reading of the paper: `gamma=2`, as printed; the released code raises the loss to `alpha` instead (`gamma=1`). MC#
    is known to us from summaries alone: importance is a weighted sum, the loss is squared; its weights are not told.

    Statistics: those of `depth`, and `depth_gate [E]`, the share of the router's weight that an expert gets. Super
    experts (`depth_super [E]`, where the file has it) get the most bits while the mean allows it.

    Example: `bit_plan(bits=2.5)`.

    Identity: none.
    """

    bits: float
    levels: tuple[int, ...] | None = None
    alpha: float = 1.0
    beta: float = 1.5
    gamma: float = 2.0
    importance: Literal["product", "sum"] = "product"

    name = "bit_plan"
    paper = "MC, arXiv 2410.06270"
    kind = "token"
    needs = ("planes_shape", "depth_energy", "depth_error", "depth_use", "depth_gate", "coverage")
    reads_depths = True

    def __post_init__(self) -> None:
        good = type(self.bits) in (int, float) and 0 < self.bits <= 8
        require(good, f"bits={self.bits!r}: give the mean bits of a weight, up to 8")
        require(self.importance in ("product", "sum"), f"importance={self.importance!r}: use 'product' or 'sum'")
        if self.levels is not None:
            good = isinstance(self.levels, list | tuple) and all(type(one) is int for one in self.levels)
            good = good and len(self.levels) > 0 and list(self.levels) == sorted(set(self.levels))
            require(good, f"levels={self.levels!r}: give bits in ascending order, such as [2, 3, 4]")
            object.__setattr__(self, "levels", tuple(self.levels))

    def prepare(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`bits [E]`, int64.

        Raises:
            CarpoolError: a level that is not stored, or bits that no plan has.
        """
        stored = stats["planes_shape"][3:].tolist()
        levels = list(self.levels or stored)
        unknown = [one for one in levels if one not in stored]
        require(not unknown, f"levels={levels}: {unknown[:1]} is not stored; use {stored}")
        require(levels[0] <= self.bits, f"bits={self.bits}: the shallowest level has {levels[0]}; ask for more")
        count_E = stats["coverage"].double()
        share_E = count_E / count_E.sum().clamp_min(1)
        gate_E = stats["depth_gate"].double()
        gate_E = gate_E / gate_E.sum().clamp_min(1e-30)
        use_E = stats["depth_use"][-1].double().mean(0)
        places = [stored.index(one) for one in levels]
        lost_EJ = (use_E * stats["depth_energy"].double() * stats["depth_error"].double()[places]).sqrt().T
        importance_E = share_E**self.alpha * gate_E**self.beta
        if self.importance == "sum":
            importance_E = self.alpha * share_E + self.beta * gate_E
        cost_EJ = importance_E.unsqueeze(-1) * lost_EJ**self.gamma
        cost_EJ = deep_outliers(cost_EJ, stats["coverage"].new_tensor(levels), stats)
        needed = [level for level in (2, 3) if {2, 3} <= set(levels)]
        plan = cheapest(cost_EJ.cpu(), levels, int(self.bits * len(cost_EJ) + SHORT), needed)
        bits_E = torch.tensor(plan, device=stats["coverage"].device)
        return {"bits": bits_E, "deepest": bits_E.amax()}

    def read_depth(self, inputs: Inputs) -> Tensor:
        """Int64 `[G, E]`."""
        return inputs.stats["bits"].expand(inputs.batch.num_groups, -1)


def cheapest(cost_EJ: Tensor, levels: list[int], bits: int, needed: list[int]) -> list[int]:
    """Levels of all experts with the least sum of costs, of those with at most so many bits together that use each
    level that is needed (where there are as many experts and bits as that takes).

    Args:
        cost_EJ: of an expert at a level, float64.
    """
    least = levels[0] * len(cost_EJ)
    extra = sum(level - levels[0] for level in needed)
    if len(cost_EJ) < len(needed) or bits < least + extra:
        needed = []
    # a cell is a set of needed levels that are met (M of them) and a number of bits used (B); a step into it takes a
    # level and comes from the cell with that many bits less, whose set lacks the level or not
    shape = (1 << len(needed), bits + 1)
    nowhere = shape[0] * shape[1]
    met_M1, used_B = torch.arange(shape[0]).unsqueeze(-1), torch.arange(shape[1])
    steps, sources = [], []
    for place, level in enumerate(levels):
        flag = 1 << needed.index(level) if level in needed else 0
        for before_M1 in (met_M1, met_M1 ^ flag)[: 1 + bool(flag)]:
            there_MB = (met_M1 & flag == flag) & (used_B >= level)
            sources.append(torch.where(there_MB, before_M1 * shape[1] + used_B - level, nowhere))
            steps.append(place)
    source_SC = torch.stack(sources).flatten(1)
    best_C = cost_EJ.new_full((nowhere + 1,), torch.inf)
    best_C[0] = 0.0
    taken = []
    for cost_S in cost_EJ[:, steps]:
        best_C[:-1], taken_C = (best_C[source_SC] + cost_S.unsqueeze(-1)).min(0)
        taken.append(taken_C.to(torch.int8))
    cell = nowhere - shape[1] + int(best_C[nowhere - shape[1] : -1].argmin())
    plan = []
    for taken_C in reversed(taken):
        step = int(taken_C[cell])
        plan.append(levels[steps[step]])
        cell = int(source_SC[step, cell])
    return plan[::-1]
