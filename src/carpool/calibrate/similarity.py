"""Similarity of experts from their outputs on the same tokens.

`N` tokens of a chunk, `E` experts, `K` experts per token, `H` hidden size. Sums are fp64 throughout: a distance is
a small difference of large numbers, and similarities that differ in the fifth digit decide who replaces whom.
"""

from __future__ import annotations

import torch
from torch import Tensor

CKA_MIN_TOKENS = 4  # the debiased estimator divides by n (n - 3)


class Similarity:
    """Running sums of one layer; `update` in any chunks gives the same `result` up to fp64 rounding.

    Every pair statistic here is a sum over tokens of a function of one token's Gram matrix `[E, E]`, so one batched
    product of the outputs serves all of them and no output is kept.
    """

    def __init__(self, num_experts: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.gram_EE = zeros(num_experts, num_experts)  # sum of E_u . E_v
        self.cosine_EE = zeros(num_experts, num_experts)  # sum of their cosines
        self.error_EE = zeros(num_experts, num_experts)  # sum of w_u^2 |E_v - E_u|^2 over tokens of u
        self.energy_E = zeros(num_experts)  # sum of w_u^2 |E_u|^2 over tokens of u
        self.coverage_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.tokens = 0

    def update(self, outputs_NEH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> None:
        """Add a chunk: every expert's output for every token, and the native routing of these tokens."""
        outputs_NEH, ids_NK = outputs_NEH.double(), ids_NK.long()
        gram_NEE = outputs_NEH @ outputs_NEH.mT
        energy_NE = gram_NEE.diagonal(dim1=1, dim2=2).clone()
        self.gram_EE += gram_NEE.sum(0)

        # only the rows of experts that a token routes to: K of its E
        rows_NKE = gram_NEE.gather(1, ids_NK.unsqueeze(2).expand(-1, -1, gram_NEE.shape[2]))
        own_NK = energy_NE.gather(1, ids_NK)
        squared_NK = weights_NK.double().square()
        distance_NKE = (own_NK.unsqueeze(2) + energy_NE.unsqueeze(1) - 2 * rows_NKE).clamp_min(0)
        experts_S = ids_NK.flatten()
        self.error_EE.index_add_(0, experts_S, (distance_NKE * squared_NK.unsqueeze(2)).flatten(0, 1))
        self.energy_E.index_add_(0, experts_S, (own_NK * squared_NK).flatten())
        self.coverage_E += experts_S.bincount(minlength=len(self.coverage_E))

        # an output of zero has no direction and is similar to none
        unit_NE = torch.where(energy_NE > 0, energy_NE.rsqrt(), 0)
        self.cosine_EE += gram_NEE.mul_(unit_NE.unsqueeze(2)).mul_(unit_NE.unsqueeze(1)).sum(0)
        self.tokens += len(outputs_NEH)

    def result(self) -> dict[str, Tensor]:
        """`similarity_frobenius`, `similarity_cosine`, `similarity_routed` `[E, E]` float32, `coverage [E]` int64.

        Rows of `similarity_routed` without evidence (no token, or an expert whose output is zero) are 0.
        """
        total_E = self.gram_EE.diagonal()
        distance_EE = (total_E.unsqueeze(1) + total_E.unsqueeze(0) - 2 * self.gram_EE).clamp_min(0).sqrt()
        energy_E1 = self.energy_E.unsqueeze(1)
        routed_EE = torch.where(energy_E1 > 0, 1 - self.error_EE / energy_E1, 0)
        largest = distance_EE.max()
        frobenius_EE = 1 - distance_EE / torch.where(largest > 0, largest, 1)
        return {
            "similarity_frobenius": _finish(_symmetric(frobenius_EE)),
            "similarity_cosine": _finish(_symmetric(self.cosine_EE / max(self.tokens, 1))),
            "similarity_routed": _finish(routed_EE),
            "coverage": self.coverage_E.cpu(),
        }


class CKA:
    """Debiased linear CKA of `E` experts on one sample of `n` tokens, an expert at a time.

    CKA compares the experts' token-by-token Gram matrices `[n, n]`. Its plain estimator tends to 1 for unrelated
    outputs when `n` is not far above `H`; U-centred Gram matrices (Székely and Rizzo 2014) remove that bias.
    """

    def __init__(self) -> None:
        self._unit: list[Tensor] = []

    def add(self, outputs_NH: Tensor) -> None:
        """The next expert's outputs on the sample, at least four tokens."""
        n = len(outputs_NH)
        # a common offset cancels in the centring below; taking it off first keeps the digits
        centred_NH = outputs_NH.double() - outputs_NH.double().mean(0)
        gram_NN = (centred_NH @ centred_NH.T).fill_diagonal_(0)
        rows_N = gram_NN.sum(1)
        gram_NN -= (rows_N.unsqueeze(0) + rows_N.unsqueeze(1)) / (n - 2)
        gram_NN += rows_N.sum() / ((n - 1) * (n - 2))
        vector = gram_NN.fill_diagonal_(0).flatten()
        norm = vector.norm()
        self._unit.append((vector / torch.where(norm > 0, norm, 1)).float())

    def result(self) -> Tensor:
        """`similarity_cka [E, E]` float32 in [-1, 1]."""
        unit_EX = torch.stack(self._unit)
        return _finish(_symmetric((unit_EX @ unit_EX.T).double()))


def _symmetric(similarity_EE: Tensor) -> Tensor:
    return (similarity_EE + similarity_EE.T) / 2


def _finish(similarity_EE: Tensor) -> Tensor:
    return similarity_EE.fill_diagonal_(1).clamp_max_(1).float().cpu()
