"""The numbers that a policy takes: budgets as counts or shares, and how those out of range are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError

Number = int | float | Tensor  # a 0-d device tensor stands for a number that changes at run time
WHOLE = (torch.int64, torch.int32)  # dtypes of a tensor that stands for a number of experts
A_HAIR = 1e-9  # 0.29 * 100 is a little less than 29 in binary


def resolve_budget(name: str, budget: Any, num_experts: int) -> Number:
    """A budget as a number of experts: an int counts them, a float in (0, 1] is `floor(budget * E)`.

    Raises:
        CarpoolError: not a number in range, a share that gives less than one expert, or a tensor that holds no number
            of experts.
    """
    if isinstance(budget, Tensor):
        return require_whole(name, budget)
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise CarpoolError(f"{name}={budget!r}: give a number of experts (int) or a share of them (float in (0, 1])")
    count = int(budget * num_experts + A_HAIR) if isinstance(budget, float) and 0 < budget <= 1 else budget
    if not isinstance(count, int):
        raise CarpoolError(f"{name}={budget!r}: a float is a share of the experts and must be in (0, 1]")
    if not 1 <= count <= num_experts:
        raise CarpoolError(f"{name}={budget!r} asks for {count} of {num_experts} experts; use 1 to {num_experts}")
    return count


def require(condition: bool, message: str) -> None:
    """Raises CarpoolError with the message unless the condition holds."""
    if not condition:
        raise CarpoolError(message)


def require_count(name: str, value: Any, least: int) -> None:
    """Raises CarpoolError unless the value is a number of experts, `least` or more (or a tensor that holds one)."""
    if isinstance(value, Tensor):
        require_whole(name, value)
        return
    require(type(value) is int and value >= least, f"{name}={value!r}: give a number of experts, {least} or more")


def require_whole(name: str, value: Tensor) -> Tensor:
    """The tensor; raises CarpoolError unless it can hold a number of experts. Its value is not looked at, which would
    wait for the device."""
    if value.dim() != 0 or value.dtype not in WHOLE:
        raise CarpoolError(
            f"{name}={value!r}: a tensor holds a number of experts, 0-d and of int64 or int32; give a share as a float"
        )
    return value


def require_within(name: str, value: int | Tensor, top_k: int) -> None:
    """Raises CarpoolError if a number of experts per token exceeds the model's."""
    fits = isinstance(value, Tensor) or value <= top_k
    require(fits, f"{name}={value!r} exceeds the model's {top_k} experts per token")
