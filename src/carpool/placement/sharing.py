"""What sharing experts adds to a placement: the busiest device of every step under a policy, from a trace alone.

`T` rows, `X` steps, `E` experts, `D` devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.artefacts.trace import Trace
from carpool.errors import CarpoolError
from carpool.placement.metro import activated_XD, fewest_activated
from carpool.placement.placement import Placement
from carpool.placement.score import places, require_fit
from carpool.plans.grammar import parse
from carpool.plans.pipeline import route
from carpool.routing.batch import Batch
from carpool.routing.spec import RouteSpec

UNCHOSEN = -30.0  # logit of what a row did not choose: the trace does not know it


@dataclass(frozen=True)
class Shared:
    """Means over layers and steps.

    Attributes:
        natural_peak, peak: experts that the busiest device reads without and with the policy, every expert on one
            device of those that hold it (METRO).
        natural_union, union: experts that are read.
        displaced: share of a row's weight that its experts outside of the coreset had.
    """

    natural_peak: float
    peak: float
    natural_union: float
    union: float
    displaced: float


def share(placement: Placement, trace: Trace, policy: str) -> Shared:
    """Run a policy on a trace's own choices.

    The trace knows the weights of the experts that rows chose and of no others, so that utilities are sums over those
    (`topk_mass`), and what takes a displaced expert's place is left open. What rows would choose in later layers, had
    they been computed so, is not known either.

    Args:
        policy: its text, with guards if you like; `xshare_expert_parallel` goes by the placement's devices.

    Raises:
        CarpoolError: a trace without weights, a policy that needs statistics or cannot be read.
    """
    require_fit(placement, trace)
    if trace.weights_TLK is None:
        raise CarpoolError(f"{policy} needs weights, and the trace has none: record one with `carpool trace MODEL`")
    parsed = parse(policy)
    if parsed.required_stats():
        raise CarpoolError(f"{policy} needs statistics of the model, which a trace does not have")
    step_T, _ = places(trace)
    steps = int(step_T[-1]) + 1
    found = []
    for layer in range(trace.num_layers):
        batch = Batch.of(
            len(trace),
            group_N=step_T,
            num_groups=steps,
            step_N=step_T,
            num_steps=steps,
            device_E=placement.device_LE[layer],
        )
        outcome = route(parsed, RouteSpec(trace.top_k), _logits(trace, layer), batch)
        holds_DE = placement.holds_LDE[layer]
        found.append([
            *(_peak(mask_XE.cpu(), holds_DE) for mask_XE in (outcome.natural_SE, outcome.union_SE)),
            *(float(mask_XE.sum(-1).double().mean()) for mask_XE in (outcome.natural_SE, outcome.union_SE)),
            float(outcome.displaced_N.double().mean()),
        ])  # fmt: skip
    return Shared(*torch.tensor(found, dtype=torch.float64).mean(0).tolist())


def _logits(trace: Trace, layer: int) -> Tensor:
    """Float32 `[T, E]`: softmax gives a row's own weights back, up to a common factor."""
    assert trace.weights_TLK is not None
    weights_TK = trace.weights_TLK[:, layer].float()
    logits_TE = torch.full((len(trace), trace.num_experts), UNCHOSEN)
    chosen_TK = torch.where(weights_TK > 0, weights_TK.clamp_min(1e-12).log(), UNCHOSEN)
    return logits_TE.scatter_reduce_(1, trace.experts_TLK[:, layer].long(), chosen_TK, "amax")


def _peak(active_XE: Tensor, holds_DE: Tensor) -> float:
    return float(activated_XD(fewest_activated(active_XE, holds_DE), len(holds_DE)).amax(-1).double().mean())
