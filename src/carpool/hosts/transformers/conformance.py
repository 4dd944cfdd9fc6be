"""Does a layer's RouteSpec say what its router does? Checked on random and on real logits."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.hosts.transformers.layers import MoELayer
from carpool.routing import Routing

ROWS = 64
TIE = 1e-6  # scores that differ by less may be ranked either way
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of a row's largest


@torch.no_grad()
def check_on_random(layer: MoELayer) -> None:
    """Run the router on random hidden states and compare; nothing to run for a model without weights (meta device).

    Raises:
        CarpoolError: the router does not route as its RouteSpec says; names the class and what differs.
    """
    weight_EH = layer.weight_EH
    if weight_EH.is_meta:
        return
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(ROWS, weight_EH.shape[1], generator=generator).to(weight_EH.device, weight_EH.dtype)
    given = [getattr(layer.block, name) for name in layer.rule.arguments]
    logits_NE, native = layer.routed(layer.router(hidden_NH, *given))
    check(layer, logits_NE, native)


@torch.no_grad()
def check(layer: MoELayer, logits_NE: Tensor, native: Routing) -> None:
    """Compare a router's own ids (outside ties) and weights with its RouteSpec's; raises as `check_on_random`."""
    finite_N = logits_NE.isfinite().all(-1)
    if not bool(finite_N.any()):
        return
    logits_NE, native = logits_NE[finite_N], Routing(native.ids_NK[finite_N].long(), native.weights_NK[finite_N])
    ours = layer.spec.native(logits_NE)
    choice_NE, weights_NE = layer.spec.scores(logits_NE)
    picked = [choice_NE.gather(-1, ids_NK.long()).sort(-1).values for ids_NK in (native.ids_NK, ours.ids_NK)]
    same_set_N = (native.ids_NK.sort(-1).values == ours.ids_NK.long().sort(-1).values).all(-1)
    tie_N = torch.isclose(picked[0].float(), picked[1].float(), rtol=TIE, atol=TIE).all(-1)
    name = type(layer.router).__name__
    if not bool((same_set_N | tie_N).all()):
        wrong = int((~(same_set_N | tie_N)).sum())
        raise CarpoolError(
            f"{layer.name}: {name} picks other experts than its routing rule says ({wrong} of {len(tie_N)} rows); "
            "this version of the model is not supported"
        )
    # at the router's own ids, so that ties do not matter
    expected_NK = layer.spec.mix(weights_NE, native.ids_NK, torch.ones_like(native.ids_NK, dtype=torch.bool)).float()
    got_NK = native.weights_NK.float()
    worst = ((expected_NK - got_NK).abs() / got_NK.abs().amax(-1, keepdim=True).clamp_min(1e-30)).amax()
    if not worst <= TOLERANCE.get(native.weights_NK.dtype, 1e-5):
        raise CarpoolError(
            f"{layer.name}: {name} weighs experts otherwise than its routing rule says (off by {float(worst):.1e} "
            "of the largest weight); this version of the model is not supported"
        )
