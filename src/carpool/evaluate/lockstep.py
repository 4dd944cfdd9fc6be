"""Lockstep evaluation: one parallel forward pass computes what step-by-step decoding of a batch computes.

Decoding `B` sequences in step means that the batch of a step is the `B` tokens at one position. Under teacher
forcing the pass over `[B, T]` with one group a position sees the same rows, caches and coresets.

Shapes: `M` batches in one pass, `B` sequences of a batch, `T` positions of which `P` are prompt and `D = T - P`
decoded, `L` MoE layers, `V` vocabulary, `C` rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from carpool.calibrate.divergence import divergence, log_probabilities
from carpool.errors import CarpoolError
from carpool.evaluate.layout import Steps
from carpool.plans.pipeline import Outcome
from carpool.plans.policy_file import AnyPlan, stats_for
from carpool.routing.batch import Batch

Observer = Callable[[int, Batch, Outcome], None]
LAYER_FIELDS = (
    "union", "natural_union", "coreset", "pairs", "displaced", "expected_loss", "changed", "overflow", "surrogates",
    "bytes",
)  # fmt: skip


class Watch:
    """Sums what every layer did in the decoding steps of each batch.

    Attributes:
        sums: by layer position, `[fields, M]` float64 in the order of `LAYER_FIELDS`.
        shares: bytes of one surrogate over those of one expert, by layer; `bytes` counts both in experts.
        sizes: bytes of one expert over those that stock reads for it, by layer and depth.
    """

    def __init__(self, layout: Steps, copies: int) -> None:
        self.layout, self.copies = layout, copies
        self.sums: dict[int, Tensor] = {}
        self.shares: list[float] = []
        self.sizes: list[Tensor] = []

    def __call__(self, layer: int, batch: Batch, outcome: Outcome) -> None:
        steps, tokens = self.layout.by_step, self.layout.by_token
        if layer in self.sums:
            raise CarpoolError(f"layer {layer} routed twice in one forward pass; lockstep evaluation needs one call")
        union_M = steps(outcome.union_SE.sum(-1), self.copies)
        surrogates_M = steps(outcome.surrogates_SE.sum(-1), self.copies)
        read_SE = self.sizes[layer].to(outcome.depth_SE.device)[outcome.depth_SE]
        values = (
            union_M,
            steps(outcome.natural_SE.sum(-1), self.copies),
            steps(outcome.coreset_GE.sum(-1), self.copies),
            tokens((outcome.routing.weights_NK != 0).sum(-1), self.copies),
            tokens(outcome.displaced_N, self.copies),
            tokens(outcome.expected_loss_N, self.copies),
            tokens(outcome.changed_N, self.copies),
            steps(outcome.overflow_SE.sum(-1), self.copies),
            surrogates_M,
            steps(read_SE.sum(-1), self.copies) + surrogates_M * self.shares[layer],
        )
        self.sums[layer] = torch.stack([value.double() for value in values])


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass under a plan.

    Attributes:
        logits_RV: of the decoded positions, `R = M * B * D` rows in the order of batch, sequence, position.
        layers_LFM: sums over the decoding steps, fields in the order of `LAYER_FIELDS`, float64.
    """

    logits_RV: Tensor
    layers_LFM: Tensor


def forward(
    model: Any,
    plan: AnyPlan,
    ids_ST: Tensor,
    layout: Steps,
    *,
    num_layers: int,
    stats: Any = None,
    observe: Observer | None = None,
    device_E: Tensor | None = None,
) -> Pass:
    """Run the sequences of `M = S / B` batches under a plan.

    Args:
        ids_ST: inputs, int64 `[M * B, T]`.
        num_layers: MoE layers of the model; fewer that report mean that a router was bypassed.
        stats: statistics for policies that need some; a policy file may name its own.
        observe: told what every layer did, too.
        device_E: device of each expert, for policies with a budget per device.

    Raises:
        CarpoolError: the policy did not run in every layer.
    """
    from carpool.hosts.transformers import share

    copies = len(ids_ST) // layout.batch_size
    device = next(model.parameters()).device
    watch = Watch(layout, copies)
    batch = layout.batch(copies, device)
    if device_E is not None:
        batch = replace(batch, device_E=device_E.to(device))

    def seen(layer: int, batch: Batch, outcome: Outcome) -> None:
        watch(layer, batch, outcome)
        if observe is not None:
            observe(layer, batch, outcome)

    how: dict[str, Any] = {"group": layout.grouping, "stats": stats_for(plan, stats), "batch": batch, "observe": seen}
    with torch.inference_mode(), share(model, plan, **how) as run:
        watch.shares, watch.sizes = run.surrogate_shares(), run.expert_sizes()
        logits_RV = layout.logits(model, ids_ST.to(device))
    if len(watch.sums) != num_layers:
        raise CarpoolError(
            f"{plan} ran in {len(watch.sums)} of {num_layers} MoE layers: the model does not use its routers"
        )
    return Pass(logits_RV, torch.stack([watch.sums[layer] for layer in sorted(watch.sums)]))


@dataclass(frozen=True, eq=False)
class Comparison:
    """What the decoded tokens say about a policy, one value a row, float64 `[R]`.

    Attributes:
        kl_R: KL(stock || policy) in nats.
        agree_R: 1 where the most likely token is the same.
        nll_R: negative log-likelihood of the text's next token under the policy, in nats.
    """

    kl_R: Tensor
    agree_R: Tensor
    nll_R: Tensor


def compare(stock_RV: Tensor, policy_RV: Tensor, targets_R: Tensor) -> Comparison:
    """Compare two passes over the same rows; log-probabilities in float32, a few rows at a time.

    Raises:
        CarpoolError: logits that are NaN or infinite.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    first = 0
    for p_CV, q_CV in log_probabilities(stock_RV, policy_RV):
        targets_C = targets_R[first : first + len(p_CV)]
        agree_C = p_CV.argmax(-1) == q_CV.argmax(-1)
        nll_C = -q_CV.gather(-1, targets_C.unsqueeze(-1)).squeeze(-1)
        parts.append((divergence(p_CV, q_CV), agree_C, nll_C))
        first += len(p_CV)
    kl_R, agree_R, nll_R = (torch.cat(column).double() for column in zip(*parts, strict=True))
    if not (kl_R + nll_R).isfinite().all():
        raise CarpoolError("the model gives logits that are not finite; evaluate it in float32 or bfloat16")
    return Comparison(kl_R, agree_R, nll_R)
