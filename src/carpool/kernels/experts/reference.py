"""What the kernels compute, in plain torch: in float32, expert by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.experts.stored import StoredExperts
from carpool.kernels.experts.activation import Activation
from carpool.routing.spec import ALL_BITS


def read_experts(
    hidden_NH: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
    depth_NK: Tensor,
    stored: StoredExperts,
    activation: Activation | None = None,
) -> Tensor:
    """The weighted sum of the experts' outputs with every pair computed at its depth, `[N, H]`.

    Args:
        depth_NK: an offered depth, `ALL_BITS` for the deepest, or 0 for a pair that is left out.
    """
    activation = activation or Activation()
    made_NKH = hidden_NH.new_zeros(*ids_NK.shape, hidden_NH.shape[-1], dtype=torch.float32)
    depth_NK = torch.where(depth_NK == ALL_BITS, stored.depths[-1], depth_NK)
    depth_NK = torch.where(weights_NK != 0, depth_NK, 0)
    for expert in ids_NK.unique().tolist():
        into, out = (planes.of_experts(slice(expert, expert + 1)) for planes in (stored.into, stored.out))
        for depth in stored.depths:
            n, k = ((ids_NK == expert) & (depth_NK == depth)).nonzero(as_tuple=True)
            if not len(n):
                continue
            wide = hidden_NH[n].float() @ into.read(depth)[0].mT
            made_NKH[n, k] = activation(wide, expert) @ out.read(depth)[0].mT + activation.out_bias_of(expert)
    return (weights_NK.float().unsqueeze(-1) * made_NKH).sum(1).to(hidden_NH.dtype)
