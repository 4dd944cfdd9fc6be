"""The one way from router logits to a routing under a plan.

logits ──► RouteSpec.scores ──► Policy.coreset ──► Policy.allowed ──► Policy.assign ──► Routing
                                    └── guards ──────┘
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from carpool.plans.grammar import Plan
from carpool.plans.guards import Bound
from carpool.policies.base import Inputs, Policy
from carpool.routing.batch import Batch
from carpool.routing.lazy import lazy_property
from carpool.routing.spec import ALL_BITS, RouteSpec, Routing, mask_of

TINY = 1e-30  # below every weight that matters; keeps 0 / 0 out


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a plan made of one layer's batch. The measures are computed when they are asked for.

    Attributes:
        routing: for the experts module.
        inputs: what the policy saw, with the batch as the guards left it.
        coreset_GE: the experts each group may use, free experts included; what a bound or a critical expert
            adds for single rows is not.
        allowed_NE: the experts each row may use.
        unfloored_NE: the same before the floor and `regret`.
        changed_N: rows whose routing differs from the native one.
        nonfinite_N: real rows with NaN or infinite logits; they kept their native routing.
        loss_E: share of a displaced pair's weight that calibration expects to be lost; None: all of it.
    """

    routing: Routing
    inputs: Inputs
    coreset_GE: Tensor
    allowed_NE: Tensor
    unfloored_NE: Tensor
    changed_N: Tensor
    nonfinite_N: Tensor
    loss_E: Tensor | None = None

    @lazy_property
    def displaced_N(self) -> Tensor:
        """Displaced mass of each row, float64 in [0, 1]: the share of its native weight whose experts are not computed
        for it, also where a surrogate stands in. This is what the floor bounds."""
        return self._missing_NK.sum(-1)

    @lazy_property
    def expected_loss_N(self) -> Tensor:
        """Displaced mass with each pair that is left to a surrogate at what calibration expects to be lost of it,
        float64 in [0, 1]. An expectation, which bounds no row."""
        if self.loss_E is None:
            return self.displaced_N
        return (self._missing_NK * self.loss_E[self.inputs.native_ids_NK.long()]).sum(-1)

    @lazy_property
    def _missing_NK(self) -> Tensor:
        """Shares of the row's native weight whose experts are not computed for it."""
        weight_NK = self.inputs.native_weight_NK
        missing_NK = weight_NK * ~self.allowed_NE.gather(-1, self.inputs.native_ids_NK.long())
        return missing_NK / weight_NK.sum(-1, keepdim=True).clamp_min(TINY)

    @lazy_property
    def computed_NE(self) -> Tensor:
        """The experts that each row reads (a weight-0 slot repeats an id and adds none)."""
        return mask_of(self.routing.ids_NK, self.inputs.num_experts)

    @lazy_property
    def natural_SE(self) -> Tensor:
        """Experts that each step would read under native routing."""
        return self.inputs.batch.step_any(self.inputs.native_NE)

    @lazy_property
    def union_SE(self) -> Tensor:
        """Experts that each step reads."""
        return self.inputs.batch.step_any(self.computed_NE)

    @lazy_property
    def depth_SE(self) -> Tensor:
        """Bits of each expert's weights that a step reads, 0 for experts that it does not, int64 `[S, E]`: an expert is
        read once, at its deepest use."""
        if self.routing.depth_NK is None:
            return self.union_SE * ALL_BITS
        return self.depth_of(self.routing.weights_NK != 0)

    def depth_of(self, pairs_NK: Tensor) -> Tensor:
        """The same for the sake of some pairs alone, bool `[N, K]`."""
        ids_NK, depth_NK = self.routing.ids_NK.long(), self.routing.depth_NK
        used_NK = pairs_NK * (ALL_BITS if depth_NK is None else depth_NK)
        N, E = self.allowed_NE.shape
        place_NK = torch.where(used_NK > 0, ids_NK, E)  # what is not used may name an expert twice
        # a compiler knows how to write, and has to ask for how to take the largest
        depth_NE = torch.zeros(N, E + 1, dtype=torch.int64, device=ids_NK.device).scatter(-1, place_NK, used_NK)
        return self.inputs.batch.step_max(depth_NE[:, :-1])

    @lazy_property
    def surrogates_SE(self) -> Tensor:
        """Experts whose surrogates each step reads."""
        ids_NK, weights_NK = self.routing.surrogate_ids_NK, self.routing.surrogate_weights_NK
        used_NE = torch.zeros_like(self.allowed_NE)
        if ids_NK is not None and weights_NK is not None:
            used_NE = used_NE.to(torch.int64).scatter_add(-1, ids_NK.long(), (weights_NK != 0).to(torch.int64)) > 0
        return self.inputs.batch.step_any(used_NE)

    @lazy_property
    def overflow_SE(self) -> Tensor:
        """Experts that a step reads only because of the floor or `regret`, padding aside."""
        batch = self.inputs.batch
        if self.unfloored_NE is self.allowed_NE:
            return torch.zeros_like(self.union_SE)
        added_SE = batch.step_any(self.allowed_NE & ~self.unfloored_NE)
        read_N1 = (batch.real_N | self.nonfinite_N).unsqueeze(-1)
        return added_SE & ~batch.step_any(self.computed_NE & self.unfloored_NE & read_N1)


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
        stats: this layer's statistics, as `plan.prepare` returned them.
        hidden_NH: the router's input, for policies that ask for it.
    """
    scores_NE, weights_NE = scored(spec, logits_NE)
    native = spec.native(logits_NE.nan_to_num()) if native is None else native
    return decide(
        plan, spec, logits_NE, scores_NE, weights_NE, batch, native=native, stats=stats or {}, hidden_NH=hidden_NH
    )


def scored(spec: RouteSpec, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
    """The scores that experts are ranked and mixed by, finite, `[N, E]` each."""
    scores_NE, weights_NE = spec.scores(logits_NE.nan_to_num())  # keeps the order of a row with masked (-inf) experts
    return scores_NE, weights_NE.float()


def decide(
    plan: Plan,
    spec: RouteSpec,
    logits_NE: Tensor,
    scores_NE: Tensor,
    weights_NE: Tensor,
    batch: Batch,
    *,
    native: Routing,
    stats: Mapping[str, Tensor],
    hidden_NH: Tensor | None,
) -> Outcome:
    """`route` from given scores (`scored`): all that depends on the plan.

    A host may compile this. The scores stay outside, so that the experts chosen do not depend on how a compiler
    rounds an exponential.
    """
    unclear_N = ~logits_NE.isfinite().all(-1)
    nonfinite_N, batch = unclear_N & batch.real_N, batch.dropping(unclear_N)
    for guard in plan.guards:
        batch = guard.batch(batch)
    inputs = Inputs(spec, scores_NE, weights_NE, native.ids_NK, batch, stats, hidden_NH)

    # a group without a voter has nobody to choose for it
    mute_G1 = inputs.voters_G1 == 0
    depth_GE = plan.policy.read_depth(inputs)
    chosen_GE = plan.policy.coreset(inputs) if depth_GE is None else depth_GE > 0
    coreset_GE = chosen_GE | inputs.free_GE | mute_G1
    for guard in plan.guards:
        coreset_GE = guard.coreset(plan.policy, inputs, coreset_GE)
    unfloored_NE = plan.policy.allowed(inputs, coreset_GE) | (batch.exempt_N.unsqueeze(-1) & inputs.native_NE)
    for guard in plan.guards:
        if not isinstance(guard, Bound):
            unfloored_NE = guard.allowed(plan.policy, inputs, unfloored_NE)
    for guard in plan.guards:
        depth_GE = guard.read_depth(inputs, depth_GE)
    allowed_NE = unfloored_NE
    for guard in plan.guards:
        if isinstance(guard, Bound):
            allowed_NE, depth_GE = guard.bound(plan.policy, inputs, allowed_NE, depth_GE)

    changed_N = (inputs.native_NE & ~allowed_NE).any(-1)
    changed_N1 = changed_N.unsqueeze(-1)
    shared = plan.policy.assign(inputs, allowed_NE, coreset_GE)
    routing = Routing(
        torch.where(changed_N1, shared.ids_NK.to(native.ids_NK.dtype), native.ids_NK),
        torch.where(changed_N1, shared.weights_NK.to(native.weights_NK.dtype), native.weights_NK),
        shared.surrogate_ids_NK,  # weight 0 in rows that are unchanged: nothing of theirs is displaced
        shared.surrogate_weights_NK,
    )
    if depth_GE is not None:
        depth_NK = _by_pair(inputs, torch.where(mute_G1 | inputs.free_GE, ALL_BITS, depth_GE), routing.ids_NK)
        routing = replace(routing, depth_NK=depth_NK)
        changed_N = changed_N | ((depth_NK < ALL_BITS) & (routing.weights_NK != 0)).any(-1)
    loss_E = plan.policy.expected_loss(inputs)
    return Outcome(routing, inputs, coreset_GE, allowed_NE, unfloored_NE, changed_N, nonfinite_N, loss_E)


def _by_pair(inputs: Inputs, depth_GE: Tensor, ids_NK: Tensor) -> Tensor:
    """Bits that each pair is computed with: its group's; all of them in exempt rows, and where a guard let a row have
    an expert that its group does not read."""
    depth_NK = Policy.by_row(inputs, depth_GE).gather(-1, ids_NK.long())
    return torch.where(inputs.batch.exempt_N.unsqueeze(-1) | (depth_NK == 0), ALL_BITS, depth_NK)
