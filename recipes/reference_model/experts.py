"""A dropless experts kernel that trains fast on a CPU, for transformers' `experts_implementation`.

Rows are sorted by expert and every expert runs one GEMM. Under bf16 each expert's rows are padded to a
multiple of 256: oneDNN builds a kernel per shape, and dropless routing gives new shapes at every step.
"""

from __future__ import annotations

import torch
from transformers.integrations.moe import ExpertsInterface

NAME = "carpool_grouped"


class GroupedLinear(torch.autograd.Function):
    """`y[s] = x[s] @ w[expert of s].T` for rows sorted by expert; `counts` are the rows of each expert."""

    @staticmethod
    def forward(ctx, x_SD, w_EOD, counts):
        y_SO = x_SD.new_empty(x_SD.shape[0], w_EOD.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            if count:
                torch.mm(x_SD[start : start + count], w_EOD[expert].T, out=y_SO[start : start + count])
            start += count
        ctx.save_for_backward(x_SD, w_EOD)
        ctx.counts = counts
        return y_SO

    @staticmethod
    def backward(ctx, dy_SO):
        x_SD, w_EOD = ctx.saved_tensors
        dy_SO = dy_SO.contiguous()
        dx_SD, dw_EOD = torch.empty_like(x_SD), torch.zeros_like(w_EOD)
        start = 0
        for expert, count in enumerate(ctx.counts):
            if count:
                rows = slice(start, start + count)
                torch.mm(dy_SO[rows], w_EOD[expert], out=dx_SD[rows])
                torch.mm(dy_SO[rows].T, x_SD[rows], out=dw_EOD[expert])
            start += count
        return dx_SD, dw_EOD, None


def grouped_experts(self, hidden_ND: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    rows, top_k = ids_NK.shape
    compute = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden_ND.dtype
    align = 256 if compute == torch.bfloat16 else 1
    flat_ids = ids_NK.reshape(-1)
    natural = torch.bincount(flat_ids, minlength=self.gate_up_proj.shape[0])
    padded = (natural + align - 1) // align * align
    order = flat_ids.argsort(stable=True)
    # slot -> its row in the padded, expert-sorted buffer
    shift = (padded.cumsum(0) - padded) - (natural.cumsum(0) - natural)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel()) + shift[flat_ids[order]]
    counts = padded.tolist()

    slot_token = torch.arange(rows).repeat_interleave(top_k)
    weights_S = weights_NK.new_zeros(sum(counts)).index_copy(0, position, weights_NK.reshape(-1))
    x_SD = hidden_ND.new_zeros(sum(counts), hidden_ND.shape[1], dtype=compute)
    x_SD = x_SD.index_copy(0, position, hidden_ND.to(compute).index_select(0, slot_token))
    with torch.autocast("cpu", enabled=False):
        gate, up = GroupedLinear.apply(x_SD, self.gate_up_proj.to(compute), counts).chunk(2, dim=-1)
        # the routing weight multiplies the narrow side, before the down projection
        inner_SI = self.act_fn(gate) * up * weights_S.to(compute).unsqueeze(-1)
        y_SD = GroupedLinear.apply(inner_SI, self.down_proj.to(compute), counts)
    return y_SD.index_select(0, position).view(rows, top_k, -1).sum(1).to(hidden_ND.dtype)


def register() -> str:
    ExpertsInterface.register(NAME, grouped_experts)
    return NAME
