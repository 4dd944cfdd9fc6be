"""What stands between an expert's two projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Activation:
    """SwiGLU, `silu(gate) * up`, or GPT-OSS's clamped form `(up + 1) * gate * sigmoid(alpha * gate)`, with biases.

    Attributes:
        interleaved: gate and up rows of the first projection alternate; otherwise all gate rows come first.
        alpha, limit: of the clamped form; `alpha` 0 is SwiGLU.
        into_bias_ER: added to the first projection's outputs, in their stored order. out_bias_EH: to the second one's.
    """

    interleaved: bool = False
    alpha: float = 0.0
    limit: float = 0.0
    into_bias_ER: Tensor | None = None
    out_bias_EH: Tensor | None = None

    def __call__(self, wide_NR: Tensor, expert: int) -> Tensor:
        """From an expert's first projection of some rows, `[N, 2 I]`, to the input of its second one, `[N, I]`."""
        if self.into_bias_ER is not None:
            wide_NR = wide_NR + self.into_bias_ER[expert].float()
        gate, up = (wide_NR[:, 0::2], wide_NR[:, 1::2]) if self.interleaved else wide_NR.chunk(2, -1)
        if not self.alpha:
            return torch.nn.functional.silu(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)

    def out_bias_of(self, expert: int) -> Tensor | float:
        """What is added to an expert's output, `[H]`."""
        return 0.0 if self.out_bias_EH is None else self.out_bias_EH[expert].float()

    def gate_first(self, inner: int) -> Tensor | None:
        """The order of the first projection's outputs that puts the gate's before the others; None: as they are."""
        order = torch.arange(2 * inner)
        return torch.cat([order[0::2], order[1::2]]) if self.interleaved else None
