"""Products of rows and experts in planes, for GPUs; see `layout` for where a weight's bits lie.

Planes are read from the top as deep as a tile's deepest row asks. Where a depth is reached that some rows read at,
those rows are multiplied by what the planes give so far, the others by zero; a row's result is thus the same whoever
shares its tile. Codes are multiplied as `2 * code - (2**depth - 1)`, odd whole numbers up to 255, which bfloat16 holds.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pairs(order_ptr, offer_ptr, first, last, ROWS: tl.constexpr):
    """Of a tile: the pairs, which of them there are, and the place of each one's depth among the offered ones."""
    place_R = first + tl.arange(0, ROWS)
    held_R = place_R < last
    pair_R = tl.load(order_ptr + place_R, held_R, other=0)
    return pair_R, held_R, tl.load(offer_ptr + pair_R, held_R, other=-1)


@triton.jit
def _product(
    x_ptr, row_R, held_R, offer_R, width, planes_ptr, stride, scale_ptr, unit_ptr, expert, output_O, wanted_O,
    blocks_out, DEPTHS: tl.constexpr, OFFERED: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows times some outputs of an expert, float32 `[ROWS, BLOCK]`, each row at its depth."""
    blocks_in, groups = tl.cdiv(width, 32), tl.cdiv(width, GROUP)
    planes_ptr += expert * PLANES * stride
    scale_ptr += expert * OFFERED * blocks_out * groups * 16
    four, eight, inputs = tl.arange(0, 4), tl.arange(0, 8), tl.arange(0, 32)
    deepest = tl.max(offer_R, 0)
    total_RO = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(blocks_in):
        at = block * 32 + inputs
        x_RI = tl.load(
            x_ptr + row_R[:, None].to(tl.int64) * width + at[None, :], held_R[:, None] & (at < width)[None, :], other=0
        )
        line_O = ((output_O // 16) * blocks_in + block) * 64 + 4 * (output_O % 16)
        code_IO = tl.zeros([32, BLOCK], tl.int32)
        for place in tl.static_range(OFFERED):
            if deepest >= place:
                for plane in tl.static_range(((DEPTHS << 4) >> (4 * place)) & 15, (DEPTHS >> (4 * place)) & 15):
                    byte_4O = tl.load(
                        planes_ptr + plane * stride + line_O[None, :] + four[:, None], wanted_O[None, :], other=0
                    )
                    bit_84O = (byte_4O[None, :, :].to(tl.int32) >> eight[:, None, None]) & 1
                    code_IO = code_IO * 2 + tl.reshape(bit_84O, [32, BLOCK])
                mine_R = offer_R == place
                if tl.max(mine_R.to(tl.int32), 0) > 0:
                    odd_IO = (2 * code_IO - ((1 << ((DEPTHS >> (4 * place)) & 15)) - 1)).to(x_RI.dtype)
                    at_O = ((place * blocks_out + output_O // 16) * groups + block * 32 // GROUP) * 16 + output_O % 16
                    scale_O = tl.load(scale_ptr + at_O, wanted_O, other=0).to(tl.float32) * 0.5
                    own_RI = tl.where(mine_R[:, None], x_RI, 0.0).to(x_RI.dtype)
                    total_RO += tl.dot(own_RI, odd_IO, input_precision="ieee") * scale_O[None, :]
    return tl.load(unit_ptr + expert) * total_RO


@triton.jit
def into_product(
    x_ptr, middle_ptr, order_ptr, offer_ptr, expert_ptr, first_ptr, last_ptr,
    planes_ptr, scale_ptr, unit_ptr, bias_ptr, stride, blocks_out, width, inner, K, alpha, limit,
    DEPTHS: tl.constexpr, OFFERED: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, CLAMPED: tl.constexpr,
):  # fmt: skip
    """Gate and up projection and what stands behind them, `[P, I]` by pair."""
    first, last = tl.load(first_ptr + tl.program_id(0)), tl.load(last_ptr + tl.program_id(0))
    if first < last:
        pair_R, held_R, offer_R = _pairs(order_ptr, offer_ptr, first, last, ROWS)
        expert = tl.load(expert_ptr + tl.program_id(0)).to(tl.int64)
        output_O = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        wanted_O = output_O < inner
        gate_RO = _product(
            x_ptr, pair_R // K, held_R, offer_R, width, planes_ptr, stride, scale_ptr, unit_ptr, expert, output_O,
            wanted_O, blocks_out, DEPTHS, OFFERED, PLANES, GROUP, ROWS, BLOCK,
        )  # fmt: skip
        up_RO = _product(
            x_ptr, pair_R // K, held_R, offer_R, width, planes_ptr, stride, scale_ptr, unit_ptr, expert,
            output_O + inner, wanted_O, blocks_out, DEPTHS, OFFERED, PLANES, GROUP, ROWS, BLOCK,
        )  # fmt: skip
        if BIAS:
            bias_ptr += expert * 2 * inner
            gate_RO += tl.load(bias_ptr + output_O, wanted_O, other=0)[None, :]
            up_RO += tl.load(bias_ptr + inner + output_O, wanted_O, other=0)[None, :]
        if CLAMPED:
            gate_RO = tl.minimum(gate_RO, limit)
            up_RO = tl.minimum(tl.maximum(up_RO, -limit), limit) + 1.0
            gate_RO = gate_RO / (1.0 + tl.exp(-alpha * gate_RO))
        else:
            gate_RO = gate_RO / (1.0 + tl.exp(-gate_RO))
        to = middle_ptr + pair_R[:, None].to(tl.int64) * inner + output_O[None, :]
        tl.store(to, (gate_RO * up_RO).to(middle_ptr.dtype.element_ty), held_R[:, None] & wanted_O[None, :])


@triton.jit
def out_product(
    middle_ptr, made_ptr, order_ptr, offer_ptr, expert_ptr, first_ptr, last_ptr,
    planes_ptr, scale_ptr, unit_ptr, bias_ptr, stride, blocks_out, width, hidden,
    DEPTHS: tl.constexpr, OFFERED: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Down projection, float32 `[P, H]` by pair."""
    first, last = tl.load(first_ptr + tl.program_id(0)), tl.load(last_ptr + tl.program_id(0))
    if first < last:
        pair_R, held_R, offer_R = _pairs(order_ptr, offer_ptr, first, last, ROWS)
        expert = tl.load(expert_ptr + tl.program_id(0)).to(tl.int64)
        output_O = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        wanted_O = output_O < hidden
        made_RO = _product(
            middle_ptr, pair_R, held_R, offer_R, width, planes_ptr, stride, scale_ptr, unit_ptr, expert, output_O,
            wanted_O, blocks_out, DEPTHS, OFFERED, PLANES, GROUP, ROWS, BLOCK,
        )  # fmt: skip
        if BIAS:
            made_RO += tl.load(bias_ptr + expert * hidden + output_O, wanted_O, other=0)[None, :]
        to = made_ptr + pair_R[:, None].to(tl.int64) * hidden + output_O[None, :]
        tl.store(to, made_RO, held_R[:, None] & wanted_O[None, :])


@triton.jit
def combine(made_ptr, weights_ptr, offer_ptr, result_ptr, hidden, K: tl.constexpr, BLOCK: tl.constexpr):
    """A row's outputs times their weights, summed in the order of its slots."""
    row, at_H = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total_H = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(K):
        pair = row * K + slot
        held = tl.load(offer_ptr + pair) >= 0
        made_H = tl.load(made_ptr + pair * hidden + at_H, (at_H < hidden) & held, other=0)
        total_H += tl.load(weights_ptr + pair).to(tl.float32) * made_H
    tl.store(result_ptr + row * hidden + at_H, total_H.to(result_ptr.dtype.element_ty), at_H < hidden)
