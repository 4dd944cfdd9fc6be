"""What experts put out and how it can be foreseen: norms, gate sums, weight ratios, norm predictor.

`N` tokens of a chunk, `E` experts, `K` experts per token, `H` hidden size. Sums are fp64 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.calibrate.capture import Layer, Seen
from carpool.calibrate.token_quantiles import TokenQuantiles

RIDGE = 1e-3  # times the mean squared hidden number
LEAST_NORM = 1e-12  # an output of zero has no logarithm


class Energy:
    """Running sums of one layer; `update` in any chunks gives the same `result` up to fp64 rounding.

    The predictor of `log ||E_e(x)||` is a ridge regression on the router's input `x`. Every expert is measured on
    every token, so all experts share one matrix `[H + 1, H + 1]` (33 MB at `H` = 2048) and one factorisation.
    """

    def __init__(self, num_experts: int, top_k: int, hidden_size: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.gate_E = zeros(num_experts)  # sums over the tokens of an expert: of its weight,
        self.norm_E = zeros(num_experts)  # of its output's norm
        self.square_E = zeros(num_experts)  # of the norm squared
        self.weighted_E = zeros(num_experts)  # and of weight times norm
        self.coverage_E = zeros(num_experts)
        self.log_sums = zeros(2)  # of log norms and of their squares, over (token, native expert) pairs
        self.inputs_DD = zeros(hidden_size + 1, hidden_size + 1)  # x x^T, with a last x of 1 for the intercept
        self.targets_DE = zeros(hidden_size + 1, num_experts)  # x log ||E_e(x)||
        self._usual = TokenQuantiles(top_k, device)
        self.together_EE = torch.zeros(num_experts, num_experts, dtype=torch.int64, device=device)

    @classmethod
    def of(cls, layer: Layer) -> Energy:
        return cls(layer.num_experts, layer.top_k, layer.weight_EH.shape[1], layer.weight_EH.device)

    def update(self, seen: Seen) -> None:
        """Add a chunk."""
        ids_NK, weights_NK, outputs_NEH = seen.ids_NK, seen.weights_NK.double(), seen.outputs_NEH.double()
        norm_NE = outputs_NEH.norm(dim=-1)
        norm_NK = norm_NE.gather(1, ids_NK)
        experts_S = ids_NK.flatten()
        for total_E, values_NK in (
            (self.gate_E, weights_NK),
            (self.norm_E, norm_NK),
            (self.square_E, norm_NK.square()),
            (self.weighted_E, weights_NK * norm_NK),
            (self.coverage_E, torch.ones_like(norm_NK)),
        ):
            total_E.index_add_(0, experts_S, values_NK.flatten())

        log_NE = norm_NE.clamp_min(LEAST_NORM).log()
        log_NK = log_NE.gather(1, ids_NK)
        self.log_sums += torch.stack([log_NK.sum(), log_NK.square().sum()])
        inputs_ND = torch.nn.functional.pad(seen.hidden_NH.double(), (0, 1), value=1.0)
        self.inputs_DD += inputs_ND.T @ inputs_ND
        self.targets_DE += inputs_ND.T @ log_NE

        self._usual.update(seen.hidden_NH, weights_NK)
        chosen_NE = torch.zeros_like(norm_NE).scatter(1, ids_NK, 1.0)
        self.together_EE += (chosen_NE.T @ chosen_NE).long()

    def result(self) -> dict[str, Tensor]:
        """Float32, by name:

        `gate_sum [E]`, `norm_mean [E]` and `norm_square_mean [E]` over an expert's tokens (0 without any);
        `reap [E]`, their mean of weight times norm (REAP's criterion, arXiv 2510.13999);
        `norm_weight [E, H]`, `norm_bias [E]`: the predictor; `norm_scale []`: mean and three standard deviations of the
        logarithms of the native experts' output norms;
        what is usual for a token (`carpool.calibrate.token_quantiles`);
        and int64 `coactivation [E, E]`: tokens that choose both experts, on the diagonal those that choose one.
        """
        seen_E = self.coverage_E.clamp_min(1)
        predictor_DE = self._predictor()
        pairs = self.coverage_E.sum()
        mean, square = self.log_sums / pairs
        result = {
            "gate_sum": self.gate_E,
            "norm_mean": self.norm_E / seen_E,
            "norm_square_mean": self.square_E / seen_E,
            "reap": self.weighted_E / seen_E,
            "norm_weight": predictor_DE[:-1].T,
            "norm_bias": predictor_DE[-1],
            "norm_scale": mean + 3 * (square - mean.square()).clamp_min(0).sqrt(),
        }
        measured = {name: tensor.float().contiguous().cpu() for name, tensor in result.items()}
        return measured | self._usual.result() | {"coactivation": self.together_EE.cpu()}

    def _predictor(self) -> Tensor:
        ridge_D = self.inputs_DD.diagonal().clone()
        ridge_D[:-1] = RIDGE * ridge_D[:-1].mean().clamp_min(LEAST_NORM)
        ridge_D[-1] = 0.0  # the intercept is free
        return torch.linalg.solve(self.inputs_DD + ridge_D.diag(), self.targets_DE)
