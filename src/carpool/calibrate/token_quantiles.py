"""What is usual for a token: how its weights fall off, and how large its hidden state is.

`N` tokens of a chunk, `K` experts per token, `H` hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

RATIO_BINS = 1000  # of a histogram over [0, 1]: quantiles are exact to 0.001
QUANTILES = 11  # 0, 0.1, ..., 1
PERCENTILES = 101
LEAST_WEIGHT = 1e-12


class TokenQuantiles:
    """Running counts of one layer; any chunks give the same `result`."""

    def __init__(self, top_k: int, device: torch.device | str = "cpu") -> None:
        self._ratios_KB = torch.zeros((top_k, RATIO_BINS + 1), dtype=torch.float64, device=device)
        self._norms: list[Tensor] = []  # four bytes a token
        self._tokens = 0

    def update(self, hidden_NH: Tensor, weights_NK: Tensor) -> None:
        """Add a chunk: the router's input and the native weights, in any order."""
        sorted_NK = weights_NK.double().sort(dim=-1, descending=True).values
        ratio_NK = sorted_NK / sorted_NK[:, :1].clamp_min(LEAST_WEIGHT)
        slots_NK = torch.arange(sorted_NK.shape[1], device=ratio_NK.device) * (RATIO_BINS + 1)
        bins_S = ((ratio_NK * RATIO_BINS).round().long() + slots_NK).flatten()
        self._ratios_KB += bins_S.bincount(minlength=self._ratios_KB.numel()).view_as(self._ratios_KB)
        self._norms.append(hidden_NH.double().abs().sum(-1).float())
        self._tokens += len(hidden_NH)

    def result(self) -> dict[str, Tensor]:
        """Float32, by name: `ratio_quantiles [K, 11]`, deciles of the weight of the j-th heaviest native expert over
        the heaviest's; `l1_quantiles [101]`, percentiles of the L1 norm of the router's input."""
        norms_N = torch.cat(self._norms).double().sort().values
        place_Q = torch.arange(PERCENTILES, device=norms_N.device) * (len(norms_N) - 1) / (PERCENTILES - 1)
        low_Q = place_Q.long().clamp_max(max(0, len(norms_N) - 2))
        norms_Q = torch.lerp(norms_N[low_Q], norms_N[(low_Q + 1).clamp_max(len(norms_N) - 1)], place_Q.double() - low_Q)
        return {"ratio_quantiles": self._ratios().float().cpu(), "l1_quantiles": norms_Q.float().cpu()}

    def _ratios(self) -> Tensor:
        """The smallest ratio that at least the wanted share of tokens does not exceed."""
        reached_KB = self._ratios_KB.cumsum(-1)
        steps = QUANTILES - 1
        wanted_Q = (torch.arange(QUANTILES, device=reached_KB.device) * self._tokens + steps - 1) // steps
        wanted_KQ = wanted_Q.clamp_min(1).double().expand(len(reached_KB), -1).contiguous()
        return torch.searchsorted(reached_KB, wanted_KQ) / RATIO_BINS
