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

        self.distance_EE = zeros(num_experts, num_experts)
        self.cosine_EE = zeros(num_experts, num_experts)
        self.error_EE = zeros(num_experts, num_experts)
        self.energy_E = zeros(num_experts)
        self.coverage_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.tokens = 0

    def update(self, outputs_NEH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> None:
        """Add a chunk: every expert's output for every token, and the native routing of these tokens."""
        outputs_NEH = outputs_NEH.double()
        gram_NEE = outputs_NEH @ outputs_NEH.mT
        energy_NE = gram_NEE.diagonal(dim1=1, dim2=2)
        distance_NEE = (energy_NE.unsqueeze(2) + energy_NE.unsqueeze(1) - 2 * gram_NEE).clamp_min_(0)
        # an output of zero has no direction and is similar to none
        norm_NE = energy_NE.sqrt()
        unit_NE = torch.where(norm_NE > 0, 1 / norm_NE, 0)
        routed_NE = torch.zeros_like(energy_NE, dtype=torch.bool).scatter(1, ids_NK.long(), True)
        squared_NE = torch.zeros_like(energy_NE).scatter_add(1, ids_NK.long(), weights_NK.double()).square()

        self.distance_EE += distance_NEE.sum(0)
        self.cosine_EE += (gram_NEE * unit_NE.unsqueeze(2) * unit_NE.unsqueeze(1)).sum(0)
        self.error_EE += (distance_NEE * squared_NE.unsqueeze(2)).sum(0)
        self.energy_E += (squared_NE * energy_NE).sum(0)
        self.coverage_E += routed_NE.sum(0)
        self.tokens += len(outputs_NEH)

    def result(self) -> dict[str, Tensor]:
        """`similarity_frobenius`, `similarity_cosine`, `similarity_routed` `[E, E]` float32, `coverage [E]` int64.

        Rows of `similarity_routed` without evidence (no token, or an expert whose output is zero) are 0.
        """
        distance_EE = self.distance_EE.sqrt()
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
