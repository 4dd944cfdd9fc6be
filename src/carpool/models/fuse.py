"""FusionRoute's equations (arXiv 2601.05106): the fused policy, where routing can matter, and both losses.

The paper leaves several things open; each reading is an argument. Logits of different models add up only where they
share one vocabulary. Shapes: `E` experts, `B` texts, `T` positions, `V` tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from carpool.errors import CarpoolError

Pooling = Literal["logits", "mean"]


def fused(router_V: Tensor, expert_V: Tensor) -> Tensor:
    """Equation 1: the sum of both log-probabilities, `[..., V]`, not normalised; its softmax is the policy."""
    return router_V.float().log_softmax(-1) + expert_V.float().log_softmax(-1)


def informative(logits_EBTV: Tensor) -> Tensor:
    """Positions at which two experts' best tokens differ, bool `[B, T]`: only there routing can matter."""
    best_EBT = logits_EBTV.argmax(-1)
    return (best_EBT != best_EBT[:1]).any(0)


def pooled(weights_BTE: Tensor, logits_EBTV: Tensor, pooling: Pooling = "logits") -> Tensor:
    """The experts' aggregated log-policy `sum_i w_i log pi_i`, `[B, T, V]`.

    The paper calls `w` the output of a linear layer. Taken as it is, it makes the loss unbounded below (log-policies
    are negative: `w` to minus infinity). Both readings here begin with its softmax.

    Args:
        pooling: `logits`: normalised again, a policy (the paper's "aggregated logits"). `mean`: not normalised, the
            weighted mean of the experts' log-probabilities.
    """
    if pooling not in ("logits", "mean"):
        raise CarpoolError(f"pooling={pooling!r}: use 'logits' or 'mean'")
    w_EBT1 = weights_BTE.float().softmax(-1).movedim(-1, 0).unsqueeze(-1)
    mixed_BTV = (w_EBT1 * logits_EBTV.float().log_softmax(-1)).sum(0)
    return mixed_BTV.log_softmax(-1) if pooling == "logits" else mixed_BTV


def sft_loss(
    router_BTV: Tensor,
    weights_BTE: Tensor,
    experts_EBTV: Tensor,
    targets_BT: Tensor,
    counted_BT: Tensor,
    *,
    share: float = 1 / 3,
    pooling: Pooling = "logits",
) -> tuple[Tensor, Tensor]:
    """The first phase's `L_LM + share * L_expert`.

    Args:
        router_BTV: the router's own logits. weights_BTE: of its head. experts_EBTV: they get no gradient.
        counted_BT: positions that are text, bool.
        share: the paper's lambda.

    Returns:
        the language-model loss and the experts' loss (already times `share`), means over their positions, in nats;
        the experts' loss is 0 where no position is informative.
    """
    experts_EBTV = experts_EBTV.detach()
    index_BT1 = targets_BT.unsqueeze(-1)
    own_BT = -router_BTV.float().log_softmax(-1).gather(-1, index_BT1).squeeze(-1)
    routed_BT = -pooled(weights_BTE, experts_EBTV, pooling).gather(-1, index_BT1).squeeze(-1)
    told_BT = informative(experts_EBTV) & counted_BT
    own = (own_BT * counted_BT).sum() / counted_BT.sum().clamp_min(1)
    return own, share * (routed_BT * told_BT).sum() / told_BT.sum().clamp_min(1)


def cdpo_loss(
    router_2BT: Tensor,
    reference_2BT: Tensor,
    expert_2BT: Tensor,
    counted_2BT: Tensor,
    *,
    beta: float = 0.1,
    reference: Literal["router", "fused"] = "router",
) -> Tensor:
    """The second phase's complemented DPO, a mean over pairs of answers, in nats.

    The experts' share of the fused policy is a constant inside the sigmoid: where the expert prefers the better answer
    already, the router gets little gradient. That share stays only because the reference is the router alone; with the
    fused policy as the reference it cancels, and the loss is plain DPO.

    Args:
        router_2BT: log-probabilities of the tokens of each pair's better (0) and worse (1) answer; of the fused policy,
            normalised, they may be given instead (`exact` of `answer_logprobs`).
        reference_2BT: the same after the first phase, without gradient.
        expert_2BT: of the expert that is chosen at each token, without gradient.
        counted_2BT: tokens of the answers, bool.
    """
    if reference not in ("router", "fused"):
        raise CarpoolError(f"reference={reference!r}: use 'router' or 'fused'")

    def total(logprobs_2BT: Tensor) -> Tensor:
        return (logprobs_2BT.float() * counted_2BT).sum(-1)

    ratio_2B = total(router_2BT) - total(reference_2BT.detach())
    inside_B = ratio_2B[0] - ratio_2B[1]
    if reference == "router":
        expert_2B = total(expert_2BT.detach())
        inside_B = inside_B + expert_2B[0] - expert_2B[1]
    return -torch.nn.functional.logsigmoid(beta * inside_B).mean()


def answer_logprobs(
    router_BTV: Tensor, expert_BTV: Tensor, targets_BT: Tensor, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given tokens by the router and by the expert, `[B, T]` each, for `cdpo_loss`.

    Args:
        exact: count the fused policy's normaliser, which the paper leaves out, as the router's: the sum of both is then
            the normalised fused log-probability.
    """
    index_BT1 = targets_BT.unsqueeze(-1)
    expert_BTV = expert_BTV.detach().float().log_softmax(-1)
    router_BTV = router_BTV.float().log_softmax(-1)
    expert_BT = expert_BTV.gather(-1, index_BT1).squeeze(-1)
    if exact:
        whole_BT = (router_BTV + expert_BTV).log_softmax(-1).gather(-1, index_BT1).squeeze(-1)
        return whole_BT - expert_BT, expert_BT
    return router_BTV.gather(-1, index_BT1).squeeze(-1), expert_BT
