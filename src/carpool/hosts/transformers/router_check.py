"""Does a layer's RouteSpec say what its router does? Checked on random and on real logits."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.hosts.transformers.layers import MoELayer
from carpool.routing.conformance import compare
from carpool.routing.spec import Routing

ROWS = 64


@torch.no_grad()
def check_on_random(layer: MoELayer) -> None:
    """Run the router on random hidden states and compare; nothing to run for a model without weights (meta device).

    Raises:
        CarpoolError: the router does not route as its RouteSpec says; names the class and what differs.
    """
    weight_EH = layer.weight_EH
    if weight_EH.is_meta:
        return
    generator = torch.Generator("cpu").manual_seed(0)
    hidden_NH = torch.randn(ROWS, weight_EH.shape[1], generator=generator, device="cpu")
    hidden_NH = hidden_NH.to(weight_EH.device, weight_EH.dtype)
    check(layer, *layer.route(hidden_NH))


def check(layer: MoELayer, logits_NE: Tensor, native: Routing) -> None:
    """Compare a router's own routing of some logits with its RouteSpec's; raises as `check_on_random`."""
    compare(layer.spec, logits_NE, native, f"{layer.name}: {type(layer.router).__name__}")
