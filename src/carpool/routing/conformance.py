"""Does a RouteSpec say what a router does? Hosts ask before they share anything, and refuse otherwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.routing.spec import RouteSpec, Routing

TIE = 1e-6  # scores that differ by less may be ranked either way
TOLERANCE = 1e-4  # of a row's largest weight, for float32 logits


@torch.no_grad()
def compare(spec: RouteSpec, logits_NE: Tensor, theirs: Routing, who: str) -> None:
    """Compare a router's own ids (outside ties) and weights with what its description says for the same logits.

    Args:
        spec: the description.
        logits_NE: the router's logits; rows that are not finite are left out.
        theirs: what the router made of them.
        who: layer and router, for messages.

    Raises:
        CarpoolError: other experts or other weights.
    """
    finite_N = logits_NE.isfinite().all(-1)
    if not bool(finite_N.any()):
        return
    logits_NE = logits_NE[finite_N]
    ids_NK, got_NK = theirs.ids_NK[finite_N].long(), theirs.weights_NK[finite_N].float()
    ours = spec.native(logits_NE)
    choice_NE, weights_NE = spec.scores(logits_NE)
    if ids_NK.shape != ours.ids_NK.shape:
        raise CarpoolError(f"{who} picks {ids_NK.shape[-1]} experts a row, not the {spec.top_k} of its rule")
    picked = [choice_NE.gather(-1, chosen.long()).sort(-1).values for chosen in (ids_NK, ours.ids_NK)]
    tie_N = torch.isclose(picked[0].float(), picked[1].float(), rtol=TIE, atol=TIE).all(-1)
    tie_N |= _group_tie(spec, choice_NE)
    same_N = (ids_NK.sort(-1).values == ours.ids_NK.long().sort(-1).values).all(-1)
    if not bool((same_N | tie_N).all()):
        wrong = int((~(same_N | tie_N)).sum())
        raise CarpoolError(
            f"{who} picks other experts than its rule ({spec.scoring}, K={spec.top_k}) says "
            f"({wrong} of {len(same_N)} rows); this model is not supported here"
        )
    # at the router's own ids, so that ties do not matter
    expected_NK = spec.mix(weights_NE, ids_NK, torch.ones_like(ids_NK, dtype=torch.bool)).float()
    error_N = ((expected_NK - got_NK).abs() / got_NK.abs().amax(-1, keepdim=True).clamp_min(1e-30)).amax(-1)
    # a router that works in 16 bits rounds logits and their log-sum-exp, so its error grows with their size
    eps = max(torch.finfo(logits_NE.dtype).eps, torch.finfo(theirs.weights_NK.dtype).eps)
    size_N = logits_NE.float().abs().amax(-1) + math.log(logits_NE.shape[-1])
    rounding_N = eps * (2 + size_N)
    error = error_N.amax()
    if not bool((error_N <= rounding_N.clamp_min(TOLERANCE)).all()):
        raise CarpoolError(
            f"{who} weighs experts otherwise than its rule ({spec.scoring}) says "
            f"(off by {float(error):.1e} of the largest weight); this model is not supported here"
        )


def _group_tie(spec: RouteSpec, choice_NE: Tensor) -> Tensor:
    """Rows whose expert groups tie at the limit, `[N]`."""
    if spec.kept_groups == spec.num_groups:
        return torch.zeros(len(choice_NE), dtype=torch.bool, device=choice_NE.device)
    ranked = spec.group_scores(choice_NE).sort(-1, descending=True).values
    return (ranked[:, spec.kept_groups - 1] - ranked[:, spec.kept_groups]).abs() <= TIE
