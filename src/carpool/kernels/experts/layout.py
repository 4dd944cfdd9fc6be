"""The layout that the kernels read: the planes of `carpool.experts`, regrouped once when a model is loaded.

Shapes: `E` experts, `D` planes, `L` offered depths, `B` bytes of one plane of an expert, `O` blocks of 16 outputs, `G`
groups of inputs, `H` hidden size, `I` inner size of an expert.

A block holds 16 outputs by 32 inputs, one plane of it is a line of 64 bytes. Byte `4 * o + b` of a line belongs to
output `o`; its bit `m` to input `4 * m + b`. Blocks of the same outputs lie behind each other: a plane is one stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from carpool.errors import CarpoolError
from carpool.experts.planes import MIDDLE, Planes
from carpool.experts.stored import StoredExperts
from carpool.kernels.experts.activation import Activation

OUTPUTS, INPUTS, LINE = 16, 32, 64  # of a block
GAP = 320  # bytes between planes: streams at equal distances would meet in the same lines of a cache


@dataclass(frozen=True, eq=False)
class Lines:
    """One projection of every expert, as the kernels read it.

    Attributes:
        planes_EDB: uint8, every plane followed by a gap.
        scale_ELOG: float16 `[E, L, O, G, 16]`, one for each output and group, by offered depth.
        unit_E: float32, a factor of an expert's scales.
        bias_ER: float32, added to the outputs; or None.
    """

    planes_EDB: Tensor
    scale_ELOG: Tensor
    unit_E: Tensor
    bias_ER: Tensor | None = None

    @classmethod
    def of(cls, planes: Planes, rows: Tensor | None = None, bias_ER: Tensor | None = None) -> Lines:
        """From the planes as they are stored.

        Args:
            rows: the order of the outputs; default: as they are stored. bias_ER: in the stored order.

        Raises:
            CarpoolError: groups that are no multiple of 32 inputs, or cells whose middle is not what is read.
        """
        if planes.centre != MIDDLE:
            raise CarpoolError("integers of other formats cannot be read by kernels of planes")
        if planes.group % INPUTS:
            raise CarpoolError(
                f"groups of {planes.group} inputs cannot be read by kernels; compress with a multiple of {INPUTS}"
            )
        stored_DERB, scale_LERG = planes.planes_DERB, planes.scale_LERG
        D, E, R, _ = stored_DERB.shape
        blocks = -(-R // OUTPUTS) * -(-planes.width // INPUTS)
        lines_EDB = torch.zeros(E, D, blocks * LINE + GAP, dtype=torch.uint8, device=planes.unit_E.device)
        for expert in range(E):  # one at a time: what is made on the way is as large as what is made
            _fill(lines_EDB[expert], stored_DERB[:, expert], rows)
        scale_LERG = pad(_ordered(scale_LERG, rows), (0, 0, 0, -R % OUTPUTS))
        scale_ELOG = scale_LERG.unflatten(2, (-1, OUTPUTS)).permute(1, 0, 2, 4, 3).contiguous()
        if bias_ER is not None:
            bias_ER = bias_ER.float() if rows is None else bias_ER.float()[:, rows]
            bias_ER = bias_ER.contiguous()
        return cls(lines_EDB, scale_ELOG, planes.unit_E.float(), bias_ER)


def _ordered(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """With its last dimension but one in another order."""
    return tensor if rows is None else tensor.index_select(-2, rows)


def _fill(lines_DB: Tensor, plane_DRB: Tensor, rows: Tensor | None) -> None:
    """Write the planes of one matrix as lines: by the kernels' own loop where it is compiled."""
    if lines_DB.device.type == "cpu" and hasattr(torch.ops.carpool, "to_lines"):
        torch.ops.carpool.to_lines(plane_DRB, rows, lines_DB)
    else:
        lines_DB[:, :-GAP] = to_lines(_ordered(plane_DRB, rows))


def to_lines(plane_DRB: Tensor) -> Tensor:
    """Planes of one matrix, eight inputs a byte, as lines `[D, bytes]`, in plain torch."""
    _, R, B = plane_DRB.shape
    blocks_in = -(-B * 8 // INPUTS)
    padded = pad(plane_DRB, (0, blocks_in * INPUTS // 8 - B, 0, -R % OUTPUTS))
    padded = padded.unflatten(1, (-1, OUTPUTS)).unflatten(-1, (blocks_in, 4))  # [D, O, 16, blocks in, 4 bytes]
    place_4 = torch.arange(4, dtype=torch.uint8, device=plane_DRB.device)
    made = torch.zeros_like(padded)
    for byte in range(4):  # holds inputs 8 * byte .. + 7, that is b = 0 .. 3 of m = 2 * byte and of the next one
        of_b = padded[..., byte, None] >> place_4
        made |= ((of_b & 1) | ((of_b >> 4) & 1) << 1) << (2 * byte)
    return made.permute(0, 1, 3, 2, 4).flatten(1)


@dataclass(frozen=True, eq=False)
class Experts:
    """A layer's experts, ready for the kernels.

    Attributes:
        into: gate rows, then up rows, of `H` inputs. out: `H` rows of `I` inputs.
        depths: the offered depths, ascending. inner: `I`. group: inputs that share a scale.
        activation: what stands between the projections.
    """

    into: Lines
    out: Lines
    depths: tuple[int, ...]
    inner: int
    group: int
    activation: Activation

    @classmethod
    def of(cls, stored: StoredExperts, activation: Activation | None = None) -> Experts:
        """From a layer's experts in planes.

        Raises:
            CarpoolError: groups that are no multiple of 32 inputs.
        """
        activation, inner = activation or Activation(), stored.out.width
        rows = activation.gate_first(inner)
        into = Lines.of(stored.into, rows, activation.into_bias_ER)
        out = Lines.of(stored.out, None, activation.out_bias_EH)
        return cls(into, out, stored.depths, inner, stored.into.group, activation)
