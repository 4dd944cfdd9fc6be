"""Surrogates: a small linear map in place of an expert, for the (row, expert) pairs whose expert is not read.

Shapes: `N` rows, `E` experts, `R` rank, `X` pairs of a row, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.artefacts.statistics import made_by
from carpool.errors import CarpoolError

NAMES = ("surrogate_in", "surrogate_out")
SCALES = ("surrogate_in_scale", "surrogate_out_scale")


@dataclass(frozen=True, eq=False)
class Surrogates:
    """A layer's surrogates: expert `e` on input `x` is taken to give `out[e, :R].T @ (in[e] @ x) + out[e, R]`.

    Attributes:
        in_XH: float `[E * R, H]`, all experts' inner rows below one another.
        out_XH: float `[E * R, H]`, the outer rows alike.
        bias_EH: float, what remains at `x = 0`.
        bytes: what one surrogate takes in memory as it is stored.
    """

    in_XH: Tensor
    out_XH: Tensor
    bias_EH: Tensor
    bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Surrogates:
        """From a layer's statistics: `surrogate_in [E, R, H]` and `surrogate_out [E, R + 1, H]`, the last row the bias;
        int8 ones with a factor a row beside them (`surrogate_in_scale [E, R]`, `surrogate_out_scale [E, R + 1]`).

        Raises:
            CarpoolError: they are missing, or of shapes that do not fit together.
        """
        missing = [name for name in NAMES if name not in tensors]
        if missing:
            raise CarpoolError(f"the statistics hold no {missing[0]!r}; make them with `{made_by(missing[0])}`")
        inner_ERH, outer_EXH = (tensors[name] for name in NAMES)
        shapes = list(inner_ERH.shape), list(outer_EXH.shape)
        fits = inner_ERH.dim() == 3 and shapes[1] == [shapes[0][0], shapes[0][1] + 1, shapes[0][2]]
        if not fits:
            raise CarpoolError(f"surrogates of shapes {shapes[0]} and {shapes[1]} do not fit together; calibrate again")
        size = inner_ERH[0].nbytes + outer_EXH[0].nbytes
        floats = []
        for name, scale, stored in zip(NAMES, SCALES, (inner_ERH, outer_EXH), strict=True):
            value = stored.to(device).float()
            if stored.dtype == torch.int8:
                if scale not in tensors or tensors[scale].shape != stored.shape[:2]:
                    raise CarpoolError(f"the statistics hold {name!r} in int8 without fitting factors; calibrate again")
                value = value * tensors[scale].to(device).float().unsqueeze(-1)
                size += tensors[scale][0].nbytes
            floats.append(value)
        inner, outer = floats
        return cls(inner.flatten(0, 1), outer[:, :-1].flatten(0, 1), outer[:, -1].contiguous(), size)

    @property
    def rank(self) -> int:
        """`R`."""
        return len(self.in_XH) // len(self.bias_EH)

    def __call__(self, hidden_NH: Tensor, ids_NX: Tensor, weights_NX: Tensor) -> Tensor:
        """The weighted sum of the surrogates' outputs, `[N, H]` float32.

        Two matrix products over all experts' rows with static shapes: what no pair uses is multiplied by 0.
        """
        weight_NE = torch.zeros(len(hidden_NH), len(self.bias_EH), device=hidden_NH.device)
        weight_NE = weight_NE.scatter_add(-1, ids_NX.long(), weights_NX.float())
        inner_NX = hidden_NH.float() @ self.in_XH.T
        scaled_NX = (inner_NX.unflatten(-1, (len(self.bias_EH), self.rank)) * weight_NE.unsqueeze(-1)).flatten(-2)
        return torch.addmm(weight_NE @ self.bias_EH, scaled_NX, self.out_XH)


def stored_part(tensors: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """What one of `world` ranks holds so that the ranks' outputs add up to the whole: some inner rows of every expert
    with their outer rows; the bias is the first rank's, the others' is 0.

    Args:
        tensors: a layer's statistics, see `Surrogates.of`.
        rank: from 0.
        world: number of ranks.
    """
    R = tensors[NAMES[0]].shape[1]
    mine = torch.arange(R, device=tensors[NAMES[0]].device).tensor_split(world)[rank]
    with_bias = torch.cat([mine, mine.new_tensor([R])])
    places = dict(zip((*NAMES, *SCALES), (mine, with_bias) * 2, strict=True))
    part = {name: tensors[name][:, places[name]].contiguous() for name in places if name in tensors}
    if rank:
        part[NAMES[1]][:, -1] = 0
    return part


def by_pairs(
    hidden_NH: Tensor,
    ids_NX: Tensor,
    weights_NX: Tensor,
    inner_ERH: Tensor,
    outer_EXH: Tensor,
    inner_scale_ER: Tensor | None = None,
    outer_scale_EX: Tensor | None = None,
) -> Tensor:
    """`Surrogates.__call__` from the stored numbers, `[N, H]` float32: reads the surrogates that a pair uses and no
    others. For a compiler, which fuses look-up, conversion and sum in each of its two steps; by itself it makes
    `[N, X, R, H]` numbers.

    Args:
        hidden_NH: the experts' input.
        ids_NX: experts left to their surrogates; where the weight is 0 any.
        weights_NX: what their outputs are mixed by.
        inner_ERH: as stored. outer_EXH: as stored, the last row the bias.
        inner_scale_ER, outer_scale_EX: factors of their rows, for int8.
    """
    factors = pair_factors(hidden_NH, ids_NX, weights_NX, inner_ERH, inner_scale_ER, outer_scale_EX)
    return pair_sum(*factors, outer_EXH)


def pair_factors(
    hidden_NH: Tensor,
    ids_NX: Tensor,
    weights_NX: Tensor,
    inner_ERH: Tensor,
    inner_scale_ER: Tensor | None,
    outer_scale_EX: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """First step of `by_pairs`: which surrogates are read, int64 `[N, X]`, and what each of their outer rows is
    multiplied by, `[N, X, R + 1]`."""
    read_NX = torch.where(weights_NX != 0, ids_NX, 0).long()  # one surrogate for all slots that mean nothing
    inner_NXR = (hidden_NH.float()[:, None, None] * inner_ERH[read_NX].float()).sum(-1)
    if inner_scale_ER is not None:
        inner_NXR = inner_NXR * inner_scale_ER[read_NX]
    factor_NXX = torch.nn.functional.pad(inner_NXR, (0, 1), value=1.0) * weights_NX.float().unsqueeze(-1)
    return read_NX, factor_NXX if outer_scale_EX is None else factor_NXX * outer_scale_EX[read_NX]


def pair_sum(read_NX: Tensor, factor_NXX: Tensor, outer_EXH: Tensor) -> Tensor:
    """Second step of `by_pairs`: the weighted sum of outer rows, `[N, H]`."""
    return (factor_NXX.unsqueeze(-1) * outer_EXH[read_NX].float()).sum((1, 2))
