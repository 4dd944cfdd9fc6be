"""Experts that several processes hold, as transformers spreads them (`DistributedConfig(ep_size=...)`).

With token dispatch every rank routes its own rows among all experts, then sends them to the ranks that hold them: the
router's output is what it always is. With router masks each rank sees its own experts alone, so that nothing could be
shared among all of them. `E` experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from carpool.errors import CarpoolError

DISPATCH = "ep_dispatch_experts"  # transformers' name of the rule


def ranks_of(model: nn.Module) -> int:
    """Processes that the experts are spread over; 1 without expert parallelism."""
    distributed: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    return int(getattr(distributed, "ep_size", None) or 1)


def require_dispatch(model: nn.Module) -> None:
    """Raises CarpoolError where experts are spread in a way that hides them from their router."""
    plan = getattr(model, "ep_plan", None) or {}
    if ranks_of(model) > 1 and DISPATCH not in plan.values():
        raise CarpoolError(
            f"this model's experts are spread over {ranks_of(model)} processes (DistributedConfig) by masks on its "
            "routers, so that no rank sees what the others' experts are asked for; load it with token dispatch (an "
            f"ep_plan with {DISPATCH!r}, Qwen3-MoE's default), or without expert parallelism"
        )


def whole(tensor: Tensor) -> Tensor:
    """A parameter as one tensor, wherever its parts are; all ranks have to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def device_of(experts: nn.Module, num_experts: int) -> Tensor | None:
    """The rank that holds each expert, int64 `[E]`: consecutive ones, equally many; None where they are all here."""
    here = getattr(experts, "num_experts", num_experts)
    if not getattr(experts, "_is_expert_parallel", False) or here == num_experts:
        return None
    return torch.arange(num_experts) // here
