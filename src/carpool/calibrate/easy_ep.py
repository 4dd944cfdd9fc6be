"""EASY-EP's scores of experts, by domain (arXiv 2504.06792).

`N` tokens of a chunk, `E` experts, `K` experts per token, `H` hidden size, `D` domains. Sums are fp64 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from carpool.calibrate.capture import Layer, Seen

LEAST = 1e-12  # a sum of scores may be zero


class EasyEP:
    """Running sums of one layer.

    A token gives each of its native experts the score `weight * ||E_e(x)|| * contribution`, where the contribution is
    `1 - cos(residual stream, residual stream + routed experts)`.
    """

    def __init__(self, num_experts: int, domains: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.domains = tuple(domains)
        self.score_DE = torch.zeros(len(domains), num_experts, dtype=torch.float64, device=device)
        self.coverage_DE = torch.zeros(len(domains), num_experts, dtype=torch.int64, device=device)
        self._residuals = True

    @classmethod
    def of(cls, layer: Layer, domains: Sequence[str]) -> EasyEP:
        return cls(layer.num_experts, domains, layer.weight_EH.device)

    def update(self, seen: Seen) -> None:
        """Add a chunk; without its residual stream there will be no scores."""
        experts = self.score_DE.shape[1]
        slot_S = (seen.domain_N.unsqueeze(1) * experts + seen.ids_NK).flatten()
        self.coverage_DE += slot_S.bincount(minlength=self.coverage_DE.numel()).view_as(self.coverage_DE)
        if seen.residual_NH is None:
            self._residuals = False
            return
        index_NKH = seen.ids_NK.unsqueeze(-1).expand(-1, -1, seen.outputs_NEH.shape[-1])
        outputs_NKH, weights_NK = seen.outputs_NEH.gather(1, index_NKH).double(), seen.weights_NK.double()
        routed_NH = (outputs_NKH * weights_NK.unsqueeze(-1)).sum(1)
        share_N1 = contribution(seen.residual_NH.double(), routed_NH).unsqueeze(-1)
        score_NK = weights_NK * outputs_NKH.norm(dim=-1) * share_N1
        self.score_DE.view(-1).index_add_(0, slot_S, score_NK.flatten())

    def result(self) -> dict[str, Tensor]:
        """`coverage/DOMAIN [E]` int64 and, unless a residual stream was missing, `easy_ep/DOMAIN [E]` float32 that
        sums to 1, and their mean over domains, `easy_ep [E]`."""
        result = {
            f"coverage/{name}": coverage_E.cpu()
            for name, coverage_E in zip(self.domains, self.coverage_DE, strict=True)
        }
        if self._residuals:
            share_DE = (self.score_DE / self.score_DE.sum(1, keepdim=True).clamp_min(LEAST)).float().cpu()
            result["easy_ep"] = share_DE.mean(0)
            result |= {f"easy_ep/{name}": share_E for name, share_E in zip(self.domains, share_DE, strict=True)}
        return result


def contribution(residual_NH: Tensor, routed_NH: Tensor) -> Tensor:
    """How much the routed experts turn the residual stream, `[N]`: 1 minus the cosine before and after their sum is
    added (shared experts left out), at least 0."""
    return (1 - torch.cosine_similarity(residual_NH, residual_NH + routed_NH, dim=-1)).clamp_min(0)
