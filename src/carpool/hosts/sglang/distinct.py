"""Slots of a row that carry nothing, for experts in plain torch, which count an expert once a row whatever its slots.

Carpool frees a slot by repeating an expert of the row with weight 0, which kernels read once. SGLang's experts on a CPU
(`moe_forward_native`) fail on it, so there a free slot names an expert that the batch reads anyway, if there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from carpool.routing.spec import mask_of


def distinct(ids_NK: Tensor, weights_NK: Tensor, num_experts: int) -> Tensor:
    """The same ids, but for slots of weight 0 that repeat another slot's: no id stands twice in a row."""
    carries_NK = weights_NK != 0
    if bool(carries_NK.all()):
        return ids_NK
    top_k = ids_NK.shape[1]
    same_NKK = ids_NK.unsqueeze(-1) == ids_NK.unsqueeze(-2)
    earlier_KK = torch.ones(top_k, top_k, dtype=torch.bool, device=ids_NK.device).tril(-1)
    free_NK = ~carries_NK & (same_NKK & (carries_NK.unsqueeze(-2) | earlier_KK)).any(-1)
    used_NE = mask_of(ids_NK, num_experts)
    order_NE = used_NE.any(0).int() + 1 - 3 * used_NE.int()  # what others read, what nobody reads, the row's own
    spare_NK = order_NE.topk(top_k, dim=-1).indices.to(ids_NK.dtype)
    place_NK = (free_NK.cumsum(-1) - 1).clamp_min(0)
    return torch.where(free_NK, spare_NK.gather(-1, place_NK), ids_NK)
