"""The weights of a layer's experts, and what rows make of them.

`R` rows, `K` experts per token, `E` experts, `H` hidden size, `I` intermediate size, `U` (row, expert) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from carpool.errors import CarpoolError


@dataclass(frozen=True, eq=False)
class Weights:
    """Experts with gated projections, `silu(gate) * up`, as Mixtral's and Qwen's: `[E, 2 I, H]` and `[E, H, I]`."""

    gate_up: Tensor
    down: Tensor

    def some(self, which: Tensor | slice) -> Weights:
        return Weights(self.gate_up[which], self.down[which])

    def shard(self, rank: int, ranks: int) -> Weights:
        """A slice of every expert's intermediate columns; the slices' outputs add up to the whole (MoEShard)."""
        width = self.down.shape[2]
        if width % ranks:
            raise CarpoolError(f"experts of width {width} do not divide into {ranks} slices")
        part = slice(rank * width // ranks, (rank + 1) * width // ranks)
        gate, up = self.gate_up.chunk(2, 1)
        return Weights(torch.cat([gate[:, part], up[:, part]], 1), self.down[:, :, part])

    def run(self, place: int, hidden_RH: Tensor) -> Tensor:
        """One expert's outputs `[R, H]`."""
        gate, up = (hidden_RH @ self.gate_up[place].T).chunk(2, -1)
        return (nn.functional.silu(gate) * up) @ self.down[place].T


def mixed(weights: Weights, place_E: Tensor, hidden_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
    """`[R, H]`: weighted outputs of the experts that are asked for, one expert at a time in order.

    Args:
        place_E: of each expert in `weights`, -1: not here. ids_RK: experts, -1: none.
    """
    # empty, but hangs on all that was exchanged: without it a rank that computes nothing would sit out the exchange of
    # gradients that the others wait in
    anchor_0H = hidden_RH[:0] * weights_RK[:0, :1] + weights.gate_up[:0].sum() + weights.down[:0].sum()
    out_RH = torch.zeros_like(hidden_RH).index_add(0, torch.arange(0, device=hidden_RH.device), anchor_0H)
    for expert in place_E.ge(0).nonzero().flatten().tolist():
        row_U, slot_U = (ids_RK == expert).nonzero(as_tuple=True)
        if len(row_U):
            own_UH = weights.run(int(place_E[expert]), hidden_RH[row_U]) * weights_RK[row_U, slot_U].unsqueeze(1)
            out_RH = out_RH.index_add(0, row_U, own_UH.to(out_RH.dtype))
    return out_RH
