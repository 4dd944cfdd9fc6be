"""A dropless experts kernel that trains fast on a CPU, for transformers' `experts_implementation`.

Expert after expert, its rows are gathered, go through one GEMM each way and are added to the result, so that what is
at work at any time fits the cache; the backward pass gathers again instead of keeping a copy of every row for each
of its experts. Under bf16 each expert's rows are padded to a multiple of 256: oneDNN builds a kernel per shape, and
dropless routing gives new shapes at every step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad, silu
from transformers.integrations.moe import ExpertsInterface

NAME = "carpool_grouped"
BF16_ROWS = 256


def _spans(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Every expert that has rows, and which of the sorted rows they are."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _padded(rows_SD: Tensor) -> Tensor:
    return pad(rows_SD, (0, 0, 0, -len(rows_SD) % BF16_ROWS)) if rows_SD.dtype == torch.bfloat16 else rows_SD


class RoutedExperts(torch.autograd.Function):
    """`y[n] = sum over its slots of weight * down(silu(gate(x[n])) * up(x[n]))`, slots sorted by expert.

    `token_S` is the row of each slot and `weights_S` its routing weight; `counts` are the slots of each expert. The
    weight multiplies the narrow side, before the down projection.
    """

    @staticmethod
    def forward(ctx, x_ND, gate_up_EOD, down_EDI, weights_S, token_S, counts):
        y_ND = torch.zeros_like(x_ND)
        gate_up_SO = x_ND.new_empty(len(token_S), gate_up_EOD.shape[1], dtype=gate_up_EOD.dtype)
        for expert, span in _spans(counts):
            token = token_S[span]
            x = _padded(x_ND.index_select(0, token).to(gate_up_EOD.dtype))
            gate_up_SO[span] = (x @ gate_up_EOD[expert].T)[: len(token)]
            gate, up = gate_up_SO[span].chunk(2, dim=-1)
            inner = silu(gate).mul_(up).mul_(weights_S[span, None])
            y_ND.index_add_(0, token, (_padded(inner) @ down_EDI[expert].T)[: len(token)].to(y_ND.dtype))
        ctx.save_for_backward(x_ND, gate_up_EOD, down_EDI, weights_S, token_S, gate_up_SO)
        ctx.counts = counts
        return y_ND

    @staticmethod
    def backward(ctx, dy_ND):
        x_ND, gate_up_EOD, down_EDI, weights_S, token_S, gate_up_SO = ctx.saved_tensors
        dx_ND, dweights_S = torch.zeros_like(x_ND), torch.zeros_like(weights_S)
        dgate_up_EOD, ddown_EDI = torch.zeros_like(gate_up_EOD), torch.zeros_like(down_EDI)
        for expert, span in _spans(ctx.counts):
            token, weight = token_S[span], weights_S[span, None]
            x = _padded(x_ND.index_select(0, token).to(gate_up_EOD.dtype))
            dy = _padded(dy_ND.index_select(0, token).to(gate_up_EOD.dtype))
            gate, up = gate_up_SO[span].chunk(2, dim=-1)
            opened = silu(gate)
            inner = opened * up
            dinner = (dy @ down_EDI[expert])[: len(token)]
            dweights_S[span] = (dinner * inner).sum(-1)
            torch.mm(dy.T, _padded(inner.mul_(weight)), out=ddown_EDI[expert])
            dinner.mul_(weight)
            dgate = torch.ops.aten.silu_backward(dinner * up, gate)
            dgate_up = _padded(torch.cat([dgate, dinner.mul_(opened)], dim=-1))
            torch.mm(dgate_up.T, x, out=dgate_up_EOD[expert])
            dx_ND.index_add_(0, token, (dgate_up @ gate_up_EOD[expert])[: len(token)].to(dx_ND.dtype))
        return dx_ND, dgate_up_EOD, ddown_EDI, dweights_S, None, None


def grouped_experts(self, hidden_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    compute = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden_ND.dtype
    flat_S = ids_NK.reshape(-1)
    order_S = flat_S.argsort(stable=True)
    counts = torch.bincount(flat_S, minlength=self.gate_up_proj.shape[0]).tolist()
    weights_S = weights_NK.reshape(-1).index_select(0, order_S).to(compute)
    with torch.autocast("cpu", enabled=False):
        return RoutedExperts.apply(
            hidden_ND, self.gate_up_proj.to(compute), self.down_proj.to(compute), weights_S,
            order_S // ids_NK.shape[1], counts,
        )  # fmt: skip


def register() -> str:
    ExpertsInterface.register(NAME, grouped_experts)
    return NAME
