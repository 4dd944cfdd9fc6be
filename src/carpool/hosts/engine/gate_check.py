"""Does a layer's RouteSpec say what its router does? Checked at load, on random logits and on the gate's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from carpool.routing.conformance import compare
from carpool.routing.spec import RouteSpec, Routing

ROWS = 64

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
            compare(spec, given_NE, native(given_NE.clone()), f"{where}: the router")
