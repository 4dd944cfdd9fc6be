"""What a layer's experts see and put out on their own tokens: second moments of their inputs, on the way in and out.

`N` tokens of a chunk, `C` of them routed to an expert, `E` experts, `K` experts per token, `H` hidden size, `I`
intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from carpool.calibrate.capture import Experts, Layer, Routed
from carpool.errors import CarpoolError


class Projections:
    """A layer's two matrices an expert, in fp32 and one layout, and what lies between them.

    Attributes:
        into_ERH: gate and up projection (`R = 2 I`; families without a gate `I`). out_EHI: down projection.
    """

    def __init__(self, layer: Layer) -> None:
        """Raises CarpoolError for experts that are not held as two plain matrices."""
        Experts(layer)  # refuses what is quantised or not in memory
        self.module: Any = layer.experts
        held = dict(layer.experts.named_parameters())
        into, out = held.get("gate_up_proj", held.get("up_proj")), held.get("down_proj")
        if into is None or out is None or into.dim() != 3 or out.dim() != 3:
            raise CarpoolError(
                f"layer {layer.index}: {type(layer.experts).__name__} does not hold its experts as two plain matrices; "
                "such models cannot be compressed yet"
            )
        transposed = getattr(layer.experts, "is_transposed", False)
        self.into_ERH, self.out_EHI = ((one.mT if transposed else one).detach().float() for one in (into, out))
        self._bias_ER = held.get("gate_up_proj_bias", held.get("up_proj_bias"))
        self._bias_EH = held.get("down_proj_bias")

    def between(self, hidden_CH: Tensor, expert: int, into_RH: Tensor | None = None) -> Tensor:
        """The input of an expert's down projection, `[C, I]`; with another gate and up projection if one is given."""
        made_CR = hidden_CH @ (self.into_ERH[expert] if into_RH is None else into_RH).T
        if self._bias_ER is not None:
            made_CR = made_CR + self._bias_ER[expert].float()
        gate = getattr(self.module, "_apply_gate", None)
        if gate is not None and getattr(self.module, "has_gate", True):
            found: Tensor = gate(made_CR)
            return found
        act: Callable[[Tensor], Tensor] = self.module.act_fn
        if made_CR.shape[-1] == self.out_EHI.shape[-1]:
            return act(made_CR)
        gated_CI, up_CI = made_CR.chunk(2, dim=-1)
        return act(gated_CI) * up_CI

    def output(self, between_CI: Tensor, expert: int, out_HI: Tensor | None = None) -> Tensor:
        """The expert's output `[C, H]`."""
        made_CH = between_CI @ (self.out_EHI[expert] if out_HI is None else out_HI).T
        return made_CH if self._bias_EH is None else made_CH + self._bias_EH[expert].float()


class Moments:
    """Running sums of one layer.

    Attributes:
        into_EHH, out_EII: `sum w^p x x'` over an expert's tokens, `w` the gate's weight. coverage_E: tokens.
    """

    def __init__(self, projections: Projections, power: int) -> None:
        self.projections, self.power = projections, power
        E, _, H = projections.into_ERH.shape
        width, device = projections.out_EHI.shape[-1], projections.into_ERH.device
        self.into_EHH = torch.zeros(E, H, H, device=device)
        self.out_EII = torch.zeros(E, width, width, device=device)
        self.coverage_E = torch.zeros(E, dtype=torch.int64, device=device)

    def update(self, routed: Routed) -> None:
        """Add a chunk of tokens."""
        for expert, rows_C, weight_C in by_expert(routed, len(self.coverage_E)):
            x_CH = routed.hidden_NH[rows_C].float()
            y_CI = self.projections.between(x_CH, expert)
            value_C1 = weight_C.pow(self.power).unsqueeze(-1)
            self.into_EHH[expert] += x_CH.T @ (value_C1 * x_CH)
            self.out_EII[expert] += y_CI.T @ (value_C1 * y_CI)
            self.coverage_E[expert] += len(rows_C)


def by_expert(routed: Routed, num_experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """Of every expert that has tokens its number, their rows `[C]` and their weights `[C]`."""
    found = []
    for expert in range(num_experts):
        row_C, slot_C = (routed.ids_NK == expert).nonzero(as_tuple=True)
        if len(row_C):
            found.append((expert, row_C, routed.weights_NK[row_C, slot_C].float()))
    return found
