"""Does a layer's RouteSpec say what its router does? Checked at load, on random logits and on the gate's own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.routing import RouteSpec, Routing

ROWS = 64
TIE = 1e-6  # scores that differ by less may be ranked either way
TOLERANCE = 1e-4  # of a row's largest weight, for float32 logits

NativeRouting = Callable[[Tensor], Routing]  # logits [N, E] to the router's own ids and weights


@torch.no_grad()
def check(spec: RouteSpec, native: NativeRouting, num_experts: int, gate_EH: Tensor | None, dtype: torch.dtype,
          device: torch.device, where: str) -> None:  # fmt: skip
    """Compare the router with its description.

    Args:
        spec: what we think it does.
        native: the router itself.
        num_experts: `E`.
        gate_EH: weight of the layer's gate, for logits as the model has them; None if it cannot be read.
        dtype: of the logits in the engine.
        device: of the logits.
        where: the layer's name, for messages.

    Raises:
        CarpoolError: other experts (outside ties) or other weights than the description says.
    """
    spec.check(num_experts)
    generator = torch.Generator().manual_seed(0)
    cases = [torch.randn(ROWS, num_experts, generator=generator) * scale for scale in (0.1, 1.0, 4.0)]
    if gate_EH is not None:
        hidden_NH = torch.randn(ROWS, gate_EH.shape[1], generator=generator)
        cases.append(hidden_NH @ gate_EH.float().cpu().T)
    for logits_NE in cases:
        for kind in {torch.float32, dtype}:
            given_NE = logits_NE.to(device, kind)
            _compare(spec, given_NE, native(given_NE.clone()), where)


def _compare(spec: RouteSpec, logits_NE: Tensor, theirs: Routing, where: str) -> None:
    ours = spec.native(logits_NE)
    choice_NE, weights_NE = spec.scores(logits_NE)
    ids_NK = theirs.ids_NK.long()
    if ids_NK.shape != ours.ids_NK.shape:
        raise CarpoolError(
            f"{where}: the router picks {ids_NK.shape[-1]} experts a row, not the {spec.top_k} of its rule"
        )
    picked = [choice_NE.gather(-1, chosen.long()).sort(-1).values for chosen in (ids_NK, ours.ids_NK)]
    tie_N = torch.isclose(picked[0].float(), picked[1].float(), rtol=TIE, atol=TIE).all(-1)
    tie_N |= _group_tie(spec, choice_NE)
    same_N = (ids_NK.sort(-1).values == ours.ids_NK.long().sort(-1).values).all(-1)
    if not bool((same_N | tie_N).all()):
        wrong = int((~(same_N | tie_N)).sum())
        raise CarpoolError(
            f"{where}: the router picks other experts than its rule ({spec.scoring}, K={spec.top_k}) says "
            f"({wrong} of {len(same_N)} rows); this model is not supported on this backend"
        )
    # at the router's own ids, so that ties do not matter
    expected_NK = spec.mix(weights_NE, ids_NK, torch.ones_like(ids_NK, dtype=torch.bool)).float()
    got_NK = theirs.weights_NK.float()
    error_N = ((expected_NK - got_NK).abs() / got_NK.abs().amax(-1, keepdim=True).clamp_min(1e-30)).amax(-1)
    # a router that works in 16 bits rounds logits and their log-sum-exp, so its error grows with their size
    size_N = logits_NE.float().abs().amax(-1) + math.log(logits_NE.shape[-1])
    rounding_N = torch.finfo(logits_NE.dtype).eps * (2 + size_N)
    error = error_N.amax()
    if not bool((error_N <= rounding_N.clamp_min(TOLERANCE)).all()):
        raise CarpoolError(
            f"{where}: the router weighs experts otherwise than its rule ({spec.scoring}) says "
            f"(off by {float(error):.1e} of the largest weight); this model is not supported on this backend"
        )


def _group_tie(spec: RouteSpec, choice_NE: Tensor) -> Tensor:
    """Rows whose expert groups tie at the limit, `[N]`."""
    if spec.kept_groups == spec.num_groups:
        return torch.zeros(len(choice_NE), dtype=torch.bool, device=choice_NE.device)
    grouped = choice_NE.unflatten(-1, (spec.num_groups, -1))
    best = grouped.amax(-1) if spec.group_score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    ranked = best.sort(-1, descending=True).values
    return (ranked[:, spec.kept_groups - 1] - ranked[:, spec.kept_groups]).abs() <= TIE
