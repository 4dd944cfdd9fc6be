"""Norms and rotary embedding for training on a CPU: a few rows at a time, so that what is at work stays in the cache.

As one elementwise pass after another over a whole batch they would cost as much as half of the matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

AT_ONCE = 1024  # rows of a norm over the hidden size


def _scale(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_gradients(dy: Tensor, x: Tensor, scale: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor]:
    unit = x * scale
    dweight_D = (dy * unit).flatten(0, -2).sum(0)
    dunit = dy * weight_D
    along = (dunit * unit).mean(-1, keepdim=True)
    return dunit.sub_(unit.mul_(along)).mul_(scale), dweight_D


class RMSNorm(torch.autograd.Function):
    """`x / rms(x) * weight` over the last dimension."""

    @staticmethod
    def forward(ctx, x, weight_D, eps):
        x_ND = x.reshape(-1, x.shape[-1])
        scale_N1 = x_ND.new_empty(len(x_ND), 1)
        y_ND = torch.empty_like(x_ND)
        for start in range(0, len(x_ND), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            scale_N1[rows] = _scale(x_ND[rows], eps)
            torch.mul(x_ND[rows], scale_N1[rows], out=y_ND[rows]).mul_(weight_D)
        ctx.save_for_backward(x_ND, scale_N1, weight_D)
        return y_ND.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x_ND, scale_N1, weight_D = ctx.saved_tensors
        dy_ND, dx_ND, dweight_D = dy.reshape(x_ND.shape), torch.empty_like(x_ND), torch.zeros_like(weight_D)
        for start in range(0, len(x_ND), AT_ONCE):
            rows = slice(start, start + AT_ONCE)
            dx_ND[rows], part_D = _norm_gradients(dy_ND[rows], x_ND[rows], scale_N1[rows], weight_D)
            dweight_D += part_D
        return dx_ND.view(dy.shape), dweight_D, None


class HeadNormRotary(torch.autograd.Function):
    """Norm of each head, then rotary embedding: `[B, R, S, heads, D]` to `[B, R, heads, S, D]`.

    `cos_SD`, `sin_SD` are of the positions. Turning halves is a roll with a sign, which the sine carries.
    """

    @staticmethod
    def forward(ctx, x, weight_D, eps, cos_SD, sin_SD):
        x_XSHD = x.reshape(-1, *x.shape[2:])
        half = x.shape[-1] // 2
        cos = cos_SD[:, None]
        turn = torch.cat([-sin_SD[:, :half], sin_SD[:, half:]], dim=-1)[:, None]
        scale_XSH1 = x.new_empty(*x_XSHD.shape[:-1], 1)
        out_XHSD = x.new_empty(len(x_XSHD), x.shape[3], x.shape[2], x.shape[4])
        for row, x_SHD in enumerate(x_XSHD):
            scale_XSH1[row] = _scale(x_SHD, eps)
            y_SHD = (x_SHD * scale_XSH1[row]).mul_(weight_D)
            turned = y_SHD.roll(half, -1).mul_(turn)
            out_XHSD[row] = turned.add_(y_SHD.mul_(cos)).transpose(0, 1)
        ctx.save_for_backward(x_XSHD, scale_XSH1, weight_D, cos, turn)
        return out_XHSD.view(*x.shape[:2], *out_XHSD.shape[1:])

    @staticmethod
    def backward(ctx, dout):
        x_XSHD, scale_XSH1, weight_D, cos, turn = ctx.saved_tensors
        dx_XSHD, dweight_D = torch.empty_like(x_XSHD), torch.zeros_like(weight_D)
        for row, dout_HSD in enumerate(dout.flatten(0, 1)):
            dout_SHD = dout_HSD.transpose(0, 1).contiguous()
            dy_SHD = (dout_SHD * turn).roll(x_XSHD.shape[-1] // 2, -1).add_(dout_SHD.mul_(cos))
            dx_XSHD[row], part_D = _norm_gradients(dy_SHD, x_XSHD[row], scale_XSH1[row], weight_D)
            dweight_D += part_D
        return dx_XSHD.view(*dout.shape[:2], *dx_XSHD.shape[1:]), dweight_D, None, None, None


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return RMSNorm.apply(x, norm.weight, norm.variance_epsilon)


def head_norm_rotary(norm: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    return HeadNormRotary.apply(x, norm.weight, norm.variance_epsilon, *rotary)
