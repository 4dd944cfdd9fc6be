"""Bit planes: the weights of a layer's experts, quantised once and readable at several depths.

Shapes: `E` experts, `R` rows (outputs) and `I` inputs of a matrix, `B` bytes that hold `I` bits, `G` groups of inputs,
`D` bits of the deepest code, `L` offered depths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from carpool.errors import CarpoolError

GROUP = 32  # inputs that share a scale
MOST_BITS = 8
SCALE_BYTES = 2
UNIT_BYTES = 4
MIDDLE = 0.5  # of a cell; its lower end is 0


@dataclass(frozen=True, eq=False)
class Planes:
    """One matrix of every expert as planes of bits, the most significant first.

    Read at depth `d`, a weight is `(code - 2**(d - 1) + centre) * scale * unit`, where `code` are its first `d` bits:
    the middle of the cell of weights that share them, so that no offset has to be stored.

    Attributes:
        planes_DERB: uint8, bit `i % 8` of byte `i // 8` belongs to input `i`.
        scale_LERG: float16, one for each group and offered depth.
        unit_E: float32, a power of two that brings an expert's scales into float16's range.
        depths: the offered depths, ascending; the last is `D`.
        width: `I`. group: inputs of a group; the last may have fewer.
        centre: of a cell, from its lower end; 0 gives the signed integers of other formats, at one depth only.
    """

    planes_DERB: Tensor
    scale_LERG: Tensor
    unit_E: Tensor
    depths: tuple[int, ...]
    width: int
    group: int = GROUP
    centre: float = MIDDLE

    def __post_init__(self) -> None:
        """Raises CarpoolError for tensors that do not fit together."""
        depths = self.depths
        if not depths or list(depths) != sorted(set(depths)) or not 1 <= depths[0] <= depths[-1] <= MOST_BITS:
            raise CarpoolError(f"planes of depths {list(depths)}: give ascending depths from 1 to {MOST_BITS}")
        D, E, R, B = self.planes_DERB.shape if self.planes_DERB.dim() == 4 else (0, 0, 0, 0)
        groups = -(-self.width // max(1, self.group))
        fits = (
            self.planes_DERB.dtype == torch.uint8 and depths[-1] == D and -(-self.width // 8) == B and self.group >= 1
            and list(self.scale_LERG.shape) == [len(depths), E, R, groups] and list(self.unit_E.shape) == [E]
        )  # fmt: skip
        if not fits:
            raise CarpoolError(
                f"planes {list(self.planes_DERB.shape)} with scales {list(self.scale_LERG.shape)} do not hold matrices "
                f"of {self.width} inputs in groups of {self.group} at depths {list(depths)}; compress the model again"
            )

    @classmethod
    def of(
        cls, codes_ERI: Tensor, scale_LERG: Tensor, depths: tuple[int, ...], group: int = GROUP, centre: float = MIDDLE
    ) -> Planes:
        """From codes of the deepest depth (integers from 0 to `2**D - 1`) and one scale for each group and depth."""
        largest_E = scale_LERG.float().amax((0, 2, 3)).clamp_min(1e-30)
        unit_E = torch.exp2(torch.floor(torch.log2(largest_E)))
        scale_LERG = (scale_LERG / unit_E[:, None, None]).to(torch.float16)
        return cls(pack(codes_ERI, depths[-1]), scale_LERG, unit_E, depths, codes_ERI.shape[-1], group, centre)

    @property
    def num_experts(self) -> int:
        return self.planes_DERB.shape[1]

    def codes(self, depth: int) -> Tensor:
        """The first bits of every weight, int32 `[E, R, I]`."""
        return unpack(self.planes_DERB[:depth], self.width)

    def read(self, depth: int) -> Tensor:
        """The weights at an offered depth, float32 `[E, R, I]`.

        Raises:
            CarpoolError: a depth that is not offered.
        """
        if depth not in self.depths:
            raise CarpoolError(f"these experts can be read at {list(self.depths)} bits, not at {depth}")
        scale_ERI = self.scale(depth).repeat_interleave(self.group, -1)[..., : self.width]
        return centred(self.codes(depth), depth, self.centre) * scale_ERI

    def scale(self, depth: int) -> Tensor:
        """The scales of an offered depth, float32 `[E, R, G]`."""
        return self.scale_LERG[self.depths.index(depth)].float() * self.unit_E[:, None, None]

    def of_experts(self, experts: Tensor | slice) -> Planes:
        """The same of some experts."""
        return replace(
            self,
            planes_DERB=self.planes_DERB[:, experts],
            scale_LERG=self.scale_LERG[:, experts],
            unit_E=self.unit_E[experts],
        )

    def bytes_read(self, depth: int) -> int:
        """Bytes of one expert's matrix that reading it at a depth takes: planes, the depth's scales, the unit."""
        _, _, R, B = self.planes_DERB.shape
        return R * (depth * B + SCALE_BYTES * self.scale_LERG.shape[-1]) + UNIT_BYTES

    @property
    def bytes_stored(self) -> int:
        """Bytes of one expert's matrix as it is stored, all depths together."""
        D, _, R, B = self.planes_DERB.shape
        return R * (D * B + SCALE_BYTES * len(self.depths) * self.scale_LERG.shape[-1]) + UNIT_BYTES

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it."""
        return {"planes": self.planes_DERB, "scale": self.scale_LERG, "unit": self.unit_E}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], depths: tuple[int, ...], width: int, group: int, centre: float = MIDDLE
    ) -> Planes:
        """From what a file holds.

        Raises:
            CarpoolError: a tensor is missing, or they do not fit together.
        """
        missing = [name for name in ("planes", "scale", "unit") if name not in tensors]
        if missing:
            raise CarpoolError(f"planes without their tensor {missing[0]!r}; compress the model again")
        return cls(tensors["planes"], tensors["scale"], tensors["unit"], depths, width, group, centre)

    def to(self, device: torch.device | str) -> Planes:
        """The same on a device."""
        return replace(
            self,
            planes_DERB=self.planes_DERB.to(device),
            scale_LERG=self.scale_LERG.to(device),
            unit_E=self.unit_E.to(device),
        )


def centred(codes: Tensor, depth: int, centre: float = MIDDLE) -> Tensor:
    """Codes as the values of their cells, in steps: -0.5 and 0.5 at depth 1, or -1 and 0 where the centre is 0."""
    return codes.float() - 2 ** (depth - 1) + centre


def nearest(steps: Tensor, depth: int, centre: float = MIDDLE) -> Tensor:
    """The codes of the cells whose values are nearest, not clamped to those that there are."""
    return (steps + 2 ** (depth - 1) + MIDDLE - centre).floor()


def pack(codes_XI: Tensor, bits: int) -> Tensor:
    """Integers below `2**bits` as planes, uint8 `[bits, ..., ceil(I / 8)]`, the most significant bit first."""
    width = codes_XI.shape[-1]
    padded = torch.nn.functional.pad(codes_XI.to(torch.uint8), (0, -width % 8)).unflatten(-1, (-1, 8))
    place_8 = torch.arange(8, dtype=torch.uint8, device=codes_XI.device)
    planes = [(((padded >> (bits - 1 - plane)) & 1) << place_8).sum(-1, dtype=torch.uint8) for plane in range(bits)]
    return torch.stack(planes)


def unpack(planes_DXB: Tensor, width: int) -> Tensor:
    """The integers that the planes hold, int32 `[..., I]`; fewer planes give their first bits."""
    place_8 = torch.arange(8, dtype=torch.uint8, device=planes_DXB.device)
    codes = torch.zeros((*planes_DXB.shape[1:], 8), dtype=torch.int32, device=planes_DXB.device)
    for plane_XB in planes_DXB:
        codes = 2 * codes + ((plane_XB.unsqueeze(-1) >> place_8) & 1)
    return codes.flatten(-2)[..., :width]
