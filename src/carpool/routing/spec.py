"""How a model turns router logits into experts and weights, as data.

Shapes: `N` rows (tokens of the flattened batch), `E` routed experts, `K` experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.routing.keys import MAX_EXPERTS

Scoring = Literal["softmax", "softmax_after_topk", "sigmoid", "sqrtsoftplus", "probabilities"]
ALL_BITS = 16  # the depth that stands for an expert as the model holds it


@dataclass(frozen=True)
class Routing:
    """What the experts module receives.

    Attributes:
        ids_NK: int32, in `[0, E)`; ids with non-zero weight are distinct within a row, a freed slot repeats
            the row's first kept id with weight 0.
        weights_NK: float, finite, in the model's own convention.
        surrogate_ids_NK: int32 in `[0, E)`, experts that a row leaves to their surrogates
            (`carpool.experts.surrogates`); None where a policy leaves none. Slots of weight 0 mean nothing.
        surrogate_weights_NK: what the surrogates' outputs are mixed by, in the convention of `weights_NK`.
        depth_NK: int64, bits of its expert's weights that each pair is computed with, `ALL_BITS` for the original (or
            all that is stored); None where every pair is.
    """

    ids_NK: Tensor
    weights_NK: Tensor
    surrogate_ids_NK: Tensor | None = None
    surrogate_weights_NK: Tensor | None = None
    depth_NK: Tensor | None = None


def mask_of(ids_NK: Tensor, num_experts: int) -> Tensor:
    """Mask `[N, E]` of each row's ids."""
    counted_NE = torch.zeros(ids_NK.shape[0], num_experts, dtype=torch.int32, device=ids_NK.device)  # len(): one size
    return counted_NE.scatter(-1, ids_NK.long(), 1) != 0  # a compiler writes booleans one by one


@dataclass(frozen=True, eq=False)
class RouteSpec:
    """A model's routing rule.

    Attributes:
        top_k: experts per token, `K`.
        scoring: `softmax` over all experts, `softmax_after_topk` (over the selected logits), `sigmoid` or
            `sqrtsoftplus` (both element-wise), or `probabilities`: what the router shows are scores already (Gemma).
        renormalize: divide the selected weights by their sum plus `renormalize_eps`.
        scaling: factor on the final weights (`routed_scaling_factor`).
        bias_E: correction bias added to the scores for the *choice* only (DeepSeek-V3), or None.
        num_groups, kept_groups: expert groups and how many of them a token may use; 1 and 1 is no limit.
        group_score: a group's score is the `max` of its members or the sum of its best two (`top2`).
        per_expert_scale_E: factor on the weight by the expert's id (Gemma), or None.
        score_in_logits_dtype: score in the dtype of the logits instead of fp32.
        weight_dtype: dtype of the weights handed to the experts; None keeps the dtype of the scores.
    """

    top_k: int
    scoring: Scoring = "softmax"
    renormalize: bool = True
    renormalize_eps: float = 0.0
    scaling: float = 1.0
    bias_E: Tensor | None = None
    num_groups: int = 1
    kept_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    per_expert_scale_E: Tensor | None = None
    score_in_logits_dtype: bool = False
    weight_dtype: torch.dtype | None = None

    def check(self, num_experts: int) -> None:
        """Raises CarpoolError where no model could route like this."""
        if not 1 <= self.top_k <= num_experts:
            raise CarpoolError(f"top_k={self.top_k} does not fit {num_experts} experts")
        if num_experts > MAX_EXPERTS:
            raise CarpoolError(f"{num_experts} experts in a layer; Carpool handles up to {MAX_EXPERTS}")
        if num_experts % self.num_groups or not 1 <= self.kept_groups <= self.num_groups:
            raise CarpoolError(
                f"{self.kept_groups} of {self.num_groups} expert groups do not divide {num_experts} experts"
            )
        size = num_experts // self.num_groups
        if self.kept_groups * size < self.top_k:
            raise CarpoolError(
                f"{self.kept_groups} expert groups of {size} experts hold fewer than top_k={self.top_k} experts"
            )
        if self.kept_groups < self.num_groups and self.group_score == "top2" and size < 2:
            raise CarpoolError("expert groups of one expert have no best two to score them by; use group_score='max'")

    def scores(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """The model's scores for all experts.

        Returns:
            choice_NE: what the router ranks by (with the correction bias), before the group limit.
            weights_NE: what it mixes by, before renormalisation and scaling.
        """
        logits_NE = logits_NE if self.score_in_logits_dtype else logits_NE.float()
        # element-wise kernels on a CPU use another exp for the last elements of a tensor: rounding from double hides
        # it, or a row's score would depend on its place in the batch
        if self.scoring == "sigmoid":
            weights_NE = logits_NE.double().sigmoid().to(logits_NE.dtype)
        elif self.scoring == "sqrtsoftplus":
            softplus_NE = torch.nn.functional.softplus(logits_NE.double()).to(logits_NE.dtype)  # routers round twice
            weights_NE = softplus_NE.double().sqrt().to(logits_NE.dtype)
        else:
            weights_NE = logits_NE if self.scoring == "probabilities" else logits_NE.softmax(-1)
        choice_NE = logits_NE if self.scoring == "softmax_after_topk" else weights_NE
        return (choice_NE if self.bias_E is None else choice_NE + self.bias_E), weights_NE

    def group_scores(self, choice_NE: Tensor) -> Tensor:
        """Score of every expert group, `[N, num_groups]`."""
        grouped = choice_NE.unflatten(-1, (self.num_groups, -1))
        return grouped.amax(-1) if self.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)

    def in_kept_groups(self, choice_NE: Tensor) -> Tensor | None:
        """Mask `[N, E]` of the experts in the groups a row may use; None if the model has no such limit."""
        if self.kept_groups == self.num_groups:
            return None
        best = self.group_scores(choice_NE)
        mine, theirs = best.unsqueeze(-1), best.unsqueeze(-2)
        numbers = torch.arange(self.num_groups, device=best.device)
        earlier = (theirs == mine) & (numbers < numbers.unsqueeze(-1))  # of two that tie, whoever computes it
        kept = ((theirs > mine) | earlier).sum(-1) < self.kept_groups
        return kept.repeat_interleave(choice_NE.shape[-1] // self.num_groups, dim=-1)

    def native(self, logits_NE: Tensor) -> Routing:
        """The model's own routing, recomputed from the logits."""
        choice_NE, weights_NE = self.scores(logits_NE)
        kept_NE = self.in_kept_groups(choice_NE)
        if kept_NE is not None:
            choice_NE = choice_NE.masked_fill(~kept_NE, -torch.inf)
        ids_NK = choice_NE.topk(self.top_k, dim=-1).indices
        kept_NK = torch.ones_like(ids_NK, dtype=torch.bool)
        return Routing(ids_NK.int(), self.mix(weights_NE, ids_NK, kept_NK))

    def mix(self, weights_NE: Tensor, ids_NK: Tensor, kept_NK: Tensor) -> Tensor:
        """Weights of the chosen experts by the model's rule; slots that are not `kept` get 0 and no share.

        Where all chosen weights underflow to 0 and the model renormalises, the first slot gets the whole weight.
        """
        raw_NK = weights_NE.gather(-1, ids_NK.long()) * kept_NK
        if self.renormalize or self.scoring == "softmax_after_topk":
            total_N1 = raw_NK.sum(-1, keepdim=True)
            first_NK = torch.arange(ids_NK.shape[-1], device=ids_NK.device) == 0
            raw_NK = torch.where(total_N1 > 0, raw_NK / (total_N1 + self.renormalize_eps), first_NK.to(raw_NK.dtype))
        if self.scaling != 1.0:
            raw_NK = raw_NK * self.scaling
        if self.per_expert_scale_E is not None:
            raw_NK = raw_NK * self.per_expert_scale_E[ids_NK.long()]
        return raw_NK if self.weight_dtype is None else raw_NK.to(self.weight_dtype)
