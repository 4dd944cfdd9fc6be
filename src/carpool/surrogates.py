"""Surrogates: a small linear map in place of an expert, for the (row, expert) pairs whose expert is not read.

Shapes: `N` rows, `E` experts, `R` rank, `X` pairs of a row, `H` hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

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
            raise CarpoolError(
                f"the statistics hold no {missing[0]!r}; make them with `carpool calibrate --surrogates RANK`"
            )
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
        scaled_NX = (inner_NX.unflatten(-1, (len(self.bias_EH), -1)) * weight_NE.unsqueeze(-1)).flatten(-2)
        return torch.addmm(weight_NE @ self.bias_EH, scaled_NX, self.out_XH)
