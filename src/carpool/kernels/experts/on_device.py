"""Experts read at a depth on GPUs: two products in Triton, and a sum in the order of a row's slots.

Nothing waits for the device and no shape hangs on a value, so a call may be recorded in a CUDA graph. Pairs are sorted
by expert and cut into tiles of 16; there are as many as the worst case needs, and those without a pair end at once.

Shapes: `P` pairs, `T` tiles; others as in `layout`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from carpool.kernels.experts.layout import Experts, Lines
from carpool.kernels.experts.product import combine, into_product, out_product

ROWS = 16  # of a tile: the least that a matrix unit takes
WARPS = 4


@dataclass(frozen=True, eq=False)
class Tiles:
    """Which pairs are computed together.

    Attributes:
        order_P: pairs by expert, those that are left out at the end. offer_P: the place of each pair's depth among the
            offered ones, -1 for a pair that is left out.
        expert_T, first_T, last_T: each tile's expert, and its pairs within `order_P`; an empty tile has none.
    """

    order_P: Tensor
    offer_P: Tensor
    expert_T: Tensor
    first_T: Tensor
    last_T: Tensor

    @classmethod
    def of(cls, ids_NK: Tensor, weights_NK: Tensor, depth_NK: Tensor, experts: Experts) -> Tiles:
        """From a call's pairs; depths that are not offered are taken for the next deeper one."""
        E, P = len(experts.into.unit_E), ids_NK.numel()
        depth_P = depth_NK.flatten().int()
        offer_P = torch.zeros_like(depth_P)
        for depth in experts.depths[:-1]:
            offer_P += depth_P > depth
        out_P = (depth_P == 0) | (weights_NK.flatten() == 0)
        offer_P = torch.where(out_P, -1, offer_P)
        expert_P = torch.where(out_P, E, ids_NK.flatten().int())
        sorted_P, order_P = torch.sort(expert_P, stable=True)
        every_E = torch.arange(E + 1, dtype=torch.int32, device=sorted_P.device)
        edges = torch.searchsorted(sorted_P, every_E, out_int32=True)
        tiles_E = (edges.diff() + ROWS - 1) // ROWS
        ends_E = tiles_E.cumsum(0)
        tile_T = torch.arange(min(P, P // ROWS + E), device=sorted_P.device)
        expert_T = torch.searchsorted(ends_E, tile_T, right=True)
        held_T = expert_T.clamp_max(E - 1)
        first_T = edges[held_T] + ROWS * (tile_T - ends_E[held_T] + tiles_E[held_T])
        last_T = torch.where(expert_T < E, torch.minimum(first_T + ROWS, edges[held_T + 1]), first_T)
        return cls(order_P.int(), offer_P, held_T.int(), first_T.int(), last_T.int())


def read_experts(
    hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, depth_NK: Tensor, experts: Experts, block: int = 32
) -> Tensor:
    """As `carpool.kernels.experts.operation.read_experts`, with activations in their own dtype.

    Args:
        depth_NK: `ALL_BITS` and what is not offered read the next deeper one that is.
        block: outputs of a program, a multiple of 16.
    """
    N, H = hidden_NH.shape
    K = ids_NK.shape[1]
    made_NKH = torch.empty(N, K, H, dtype=torch.float32, device=hidden_NH.device)
    result_NH = torch.empty_like(hidden_NH)
    if not N:
        return result_NH
    depth_NK = depth_NK.clamp_max(experts.depths[-1])
    tiles = Tiles.of(ids_NK, weights_NK, depth_NK, experts)
    middle_PI = torch.empty(N * K, experts.inner, dtype=hidden_NH.dtype, device=hidden_NH.device)
    shape = {
        "DEPTHS": sum(depth << (4 * place) for place, depth in enumerate(experts.depths)),
        "OFFERED": len(experts.depths), "PLANES": experts.depths[-1], "GROUP": experts.group, "ROWS": ROWS,
        "BLOCK": block, "num_warps": WARPS,
    }  # fmt: skip
    activation, count = experts.activation, len(tiles.expert_T)
    into_product[count, triton.cdiv(experts.inner, block)](
        hidden_NH.contiguous(), middle_PI, *vars(tiles).values(), *_lines(experts.into), H, experts.inner, K,
        activation.alpha, activation.limit, BIAS=experts.into.bias_ER is not None, CLAMPED=bool(activation.alpha),
        **shape,
    )  # fmt: skip
    out_product[count, triton.cdiv(H, block)](
        middle_PI, made_NKH, *vars(tiles).values(), *_lines(experts.out), experts.inner, H,
        BIAS=experts.out.bias_ER is not None, **shape,
    )  # fmt: skip
    combine[N, triton.cdiv(H, 256)](
        made_NKH, weights_NK.contiguous(), tiles.offer_P, result_NH, H, K=K, BLOCK=256, num_warps=WARPS
    )  # fmt: skip
    return result_NH


def _lines(lines: Lines) -> tuple[Tensor | int, ...]:
    """What a product takes of a projection; a bias that is not there is not looked at."""
    bias = lines.unit_E if lines.bias_ER is None else lines.bias_ER
    return lines.planes_EDB, lines.scale_ELOG, lines.unit_E, bias, lines.planes_EDB.shape[2], lines.scale_ELOG.shape[2]
