"""Fits surrogates: for every expert the linear map of low rank that best foresees its output on its own tokens.

`N` tokens of a chunk, `C` of them routed to an expert, `E` experts, `R` rank, `H` hidden size, `D = H + 1`.

With `x` and `y` centred over an expert's tokens, the map minimises `sum |y - A x|^2 + ridge |A|^2` among all `A` of
rank `R`. With `X'X + ridge = L L'` that is `A' = L'^-1 T_R`, where `T_R` is the truncated singular value decomposition
of `L^-1 X'Y` (reduced-rank regression: Izenman 1975, with a ridge penalty: Mukherjee and Zhu 2011). Rank 0
leaves the mean output, the constant that MoNE (arXiv 2507.00390) puts in the place of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from carpool.calibrate.capture import Experts, Layer, Seen
from carpool.errors import CarpoolError
from carpool.experts.surrogates import NAMES, SCALES, Surrogates

RIDGE = 1e-2  # times the mean variance of an input
ROUNDING = 1e-5  # times the mean square of an input: the least ridge
LEAST_TOKENS = 32  # an expert with fewer tokens in the fit gets no surrogate
LEAST_HELD = 8  # nor one with fewer tokens to measure it on
STORED = ("int8", "bf16", "fp32")


@dataclass(eq=False)
class SurrogateFit:
    """A collector of `carpool.calibrate`: sums over each expert's own tokens, solved at the end.

    Memory: `2 E D H` numbers in fp32 a layer, and the held-out inputs.

    Attributes:
        layer: the MoE layer. rank: `R`. stored: how the file holds the surrogates, one of `STORED`.
    """

    layer: Layer
    rank: int
    stored: str = "int8"
    _held: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # inputs and choices

    def __post_init__(self) -> None:
        """Raises CarpoolError for a rank that no surrogate can have, or an unknown way to store them."""
        E, H = self.layer.weight_EH.shape
        if not 0 <= self.rank <= H // 2:
            raise CarpoolError(f"surrogates of rank {self.rank}: give 0 to {H // 2}, half of the model's width {H}")
        if self.stored not in STORED:
            raise CarpoolError(f"surrogates stored as {self.stored!r}: use one of {', '.join(STORED)}")
        device = self.layer.weight_EH.device
        self.inputs_EDD = torch.zeros(E, H + 1, H + 1, device=device)
        self.targets_EDH = torch.zeros(E, H + 1, H, device=device)

    def update(self, seen: Seen) -> None:
        """Add a chunk of tokens: those that are held out to the measure, the others to the fit."""
        hidden_NH, held_N = seen.hidden_NH.float(), seen.held_N
        self._held.append((hidden_NH[held_N], seen.ids_NK[held_N]))
        inputs_ND = torch.nn.functional.pad(hidden_NH, (0, 1), value=1.0)
        for expert in range(len(self.inputs_EDD)):
            rows_C = ((seen.ids_NK == expert).any(-1) & ~held_N).nonzero().squeeze(-1)
            if len(rows_C):
                x_CD, y_CH = inputs_ND[rows_C], seen.outputs_NEH[rows_C, expert].float()
                self.inputs_EDD[expert] += x_CD.T @ x_CD
                self.targets_EDH[expert] += x_CD.T @ y_CH

    def result(self) -> dict[str, Tensor]:
        """By name: `surrogate_in`, `surrogate_out` (see `carpool.experts.surrogates.Surrogates`) with their factors;
        `surrogate_energy [E]`, mean squared length of an expert's output on its held-out tokens;
        `surrogate_unexplained [E]`, the share of it that the surrogate leaves, 1 for experts without a surrogate.

        Raises:
            CarpoolError: no token was held out.
        """
        if not sum(len(hidden_NH) for hidden_NH, _ in self._held):
            raise CarpoolError("surrogates need sequences that are held out to measure them: raise --tokens")
        count_E = self.inputs_EDD[:, -1, -1]
        E, _, H = self.targets_EDH.shape
        inner_ERH = torch.zeros(E, self.rank, H, device=count_E.device)
        outer_EXH = torch.zeros(E, self.rank + 1, H, device=count_E.device)
        known_E = count_E >= LEAST_TOKENS
        for expert in known_E.nonzero().flatten().tolist():
            inner, outer = solve(self.inputs_EDD[expert], self.targets_EDH[expert], self.rank)
            inner_ERH[expert], outer_EXH[expert] = inner, outer
        tensors = stored({NAMES[0]: inner_ERH, NAMES[1]: outer_EXH}, self.stored)
        energy_E, left_E, tokens_E = self._measure(Surrogates.of(tensors, self.layer.weight_EH.device))
        # held-out tokens decide; an expert with hardly any is not trusted either
        measured_E = (tokens_E >= LEAST_HELD) & known_E
        share_E = torch.where(measured_E, left_E / energy_E.clamp_min(1e-30), 1.0).clamp(0, 1)
        tensors["surrogate_energy"] = energy_E / tokens_E.clamp_min(1)
        tensors["surrogate_unexplained"] = share_E
        return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}

    def _measure(self, surrogates: Surrogates) -> tuple[Tensor, Tensor, Tensor]:
        """Of every expert on its held-out tokens: energy, energy that its surrogate leaves, tokens."""
        hidden_NH, ids_NK = (torch.cat(part) for part in zip(*self._held, strict=True))
        sums_E3 = torch.zeros(len(self.inputs_EDD), 3, device=hidden_NH.device)
        with Experts(self.layer).ready() as run:
            for expert in range(len(sums_E3)):
                x_CH = hidden_NH[(ids_NK == expert).any(-1)]
                if len(x_CH):
                    ids_C1 = torch.full((len(x_CH), 1), expert, device=x_CH.device)
                    ones_C1 = torch.ones(len(x_CH), 1, device=x_CH.device)
                    y_CH = run(x_CH, ids_C1, ones_C1)
                    error_CH = y_CH - surrogates(x_CH, ids_C1, ones_C1)
                    sums_E3[expert] = torch.stack([y_CH.square().sum(), error_CH.square().sum(), ones_C1.sum()])
        energy_E, left_E, tokens_E = sums_E3.unbind(-1)
        return energy_E, left_E, tokens_E


def solve(inputs_DD: Tensor, targets_DH: Tensor, rank: int, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """The surrogate of one expert from its sums: inner rows `[R, H]` and outer rows `[R + 1, H]`, the bias last.

    Args:
        inputs_DD: `sum [x; 1] [x; 1]'`. targets_DH: `sum [x; 1] y'`.
    """
    inputs_DD, targets_DH = inputs_DD.double(), targets_DH.double()
    count = inputs_DD[-1, -1].clamp_min(1)
    mean_in_H, mean_out_H = inputs_DD[-1, :-1] / count, targets_DH[-1] / count
    inputs_HH = inputs_DD[:-1, :-1] - count * torch.outer(mean_in_H, mean_in_H)
    targets_HH = targets_DH[:-1] - count * torch.outer(mean_in_H, mean_out_H)
    # sums are fp32: rounding must not make the difference indefinite where few tokens or none vary
    rounding = ROUNDING * inputs_DD[:-1, :-1].diagonal().mean()
    strength = torch.maximum(ridge * inputs_HH.diagonal().mean(), rounding).clamp_min(1e-12)
    lower_HH = torch.linalg.cholesky(inputs_HH + strength * torch.eye(len(inputs_HH), device=inputs_HH.device))
    left_HH, values_H, right_HH = torch.linalg.svd(torch.linalg.solve_triangular(lower_HH, targets_HH, upper=False))
    root_R = values_H[:rank].sqrt()
    inner_HR = torch.linalg.solve_triangular(lower_HH.T, left_HH[:, :rank] * root_R, upper=True)
    outer_RH = right_HH[:rank] * root_R.unsqueeze(-1)
    bias_H = mean_out_H - mean_in_H @ inner_HR @ outer_RH
    return inner_HR.T, torch.cat([outer_RH, bias_H.unsqueeze(0)])


def stored(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    """Surrogates as a statistics file holds them: as they are, in bf16, or in int8 with a factor a row."""
    if how != "int8":
        return {name: tensor.to(torch.bfloat16 if how == "bf16" else torch.float32) for name, tensor in tensors.items()}
    made: dict[str, Tensor] = {}
    for name, scale in zip(NAMES, SCALES, strict=True):
        factor_EX = (tensors[name].abs().amax(-1) / 127).clamp_min(1e-30)
        made[name] = (tensors[name] / factor_EX.unsqueeze(-1)).round().to(torch.int8)
        made[scale] = factor_EX
    return made
