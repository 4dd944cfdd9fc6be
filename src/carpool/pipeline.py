"""The one way from router logits to a routing under a plan.

logits ──► RouteSpec.scores ──► Policy.coreset ──► Policy.allowed ──► Policy.assign ──► Routing
                                    └── guards ──────┘
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.batch import Batch
from carpool.grammar import Plan
from carpool.guards import Floor
from carpool.policies.base import Inputs
from carpool.routing import RouteSpec, Routing

TINY = 1e-30  # below every weight that matters; keeps 0 / 0 out


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a plan made of one layer's batch.

    Attributes:
        routing: for the experts module.
        coreset_GE: the experts each group may use, free experts included; what the floor or a critical expert
            adds for single rows is not.
        changed_N: rows whose routing differs from the native one.
        displaced_N: displaced mass of each row, a share of its native weight in [0, 1], float32.
        natural_SE, union_SE: experts read in each step under native routing and now.
        overflow_SE: experts that a step reads only because of the floor.
        nonfinite_N: rows with NaN or infinite logits; they kept their native routing.
    """

    routing: Routing
    coreset_GE: Tensor
    changed_N: Tensor
    displaced_N: Tensor
    natural_SE: Tensor
    union_SE: Tensor
    overflow_SE: Tensor
    nonfinite_N: Tensor


def route(
    plan: Plan,
    spec: RouteSpec,
    logits_NE: Tensor,
    batch: Batch,
    *,
    native: Routing | None = None,
    stats: Mapping[str, Tensor] | None = None,
    hidden_NH: Tensor | None = None,
) -> Outcome:
    """Route a batch under a plan.

    Args:
        plan: a policy and its guards.
        spec: the model's routing rule.
        logits_NE: the router's logits.
        batch: who the rows are.
        native: the host's own routing; recomputed from the logits if not given. Rows that the plan leaves
            unchanged get exactly these ids and weights back.
        stats: this layer's statistics, as `plan.policy.prepare` returned them.
        hidden_NH: the router's input, for policies that ask for it.
    """
    nonfinite_N = ~logits_NE.isfinite().all(-1)
    logits_NE = logits_NE.masked_fill(nonfinite_N.unsqueeze(-1), 0.0)
    batch = batch.dropping(nonfinite_N)
    for guard in plan.guards:
        batch = guard.batch(batch)
    native = spec.native(logits_NE) if native is None else native
    scores_NE, weights_NE = spec.scores(logits_NE)
    inputs = Inputs(spec, scores_NE, weights_NE.float(), native.ids_NK, batch, stats or {}, hidden_NH)

    # a group without a voter has nobody to choose for it
    mute_G1 = inputs.voters_G1 == 0
    coreset_GE = plan.policy.coreset(inputs) | inputs.free_GE | mute_G1
    for guard in plan.guards:
        coreset_GE = guard.coreset(plan.policy, inputs, coreset_GE)
    allowed_NE = plan.policy.allowed(inputs, coreset_GE) | (batch.exempt_N.unsqueeze(-1) & inputs.native_NE)
    before_floor_NE = allowed_NE
    for guard in plan.guards:
        if isinstance(guard, Floor):
            before_floor_NE = allowed_NE
        allowed_NE = guard.allowed(plan.policy, inputs, allowed_NE)

    lost_NE = inputs.native_NE & ~allowed_NE
    changed_N = lost_NE.any(-1)
    changed_N1 = changed_N.unsqueeze(-1)
    shared = plan.policy.assign(inputs, allowed_NE, coreset_GE)
    routing = Routing(
        torch.where(changed_N1, shared.ids_NK.to(native.ids_NK.dtype), native.ids_NK),
        torch.where(changed_N1, shared.weights_NK.to(native.weights_NK.dtype), native.weights_NK),
    )
    computed_NE = _computed(inputs.native_NE, routing)
    return Outcome(
        routing=routing,
        coreset_GE=coreset_GE,
        changed_N=changed_N,
        displaced_N=(inputs.native_weight_NE * lost_NE).sum(-1) / inputs.native_weight_NE.sum(-1).clamp_min(TINY),
        natural_SE=batch.step_any(inputs.native_NE),
        union_SE=batch.step_any(computed_NE),
        overflow_SE=batch.step_any(allowed_NE & ~before_floor_NE) & ~batch.step_any(computed_NE & before_floor_NE),
        nonfinite_N=nonfinite_N,
    )


def _computed(native_NE: Tensor, routing: Routing) -> Tensor:
    """Mask `[N, E]` of the experts that are read; a weight-0 slot repeats an id and adds none."""
    return torch.zeros_like(native_NE).scatter(-1, routing.ids_NK.long(), True)
