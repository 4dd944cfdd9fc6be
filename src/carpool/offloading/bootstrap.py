"""Intervals over requests: what they would be if other requests of the same kind had come."""

from __future__ import annotations

import torch
from torch import Tensor

DRAWS = 1000
CONFIDENCE = 0.95


def draws(requests: int, seed: int = 0) -> Tensor:
    """How often each request is in each draw with replacement, float64 `[draws, requests]`."""
    generator = torch.Generator().manual_seed(seed)
    picked_BR = torch.randint(requests, (DRAWS, requests), generator=generator)
    ones_BR = torch.ones(DRAWS, requests, dtype=torch.float64)
    return torch.zeros_like(ones_BR).scatter_add_(1, picked_BR, ones_BR)


def ends(drawn_B: Tensor) -> tuple[float, float]:
    """Of the middle 95 % of what was drawn."""
    beyond = (1 - CONFIDENCE) / 2
    low, high = drawn_B.double().quantile(torch.tensor([beyond, 1 - beyond], dtype=torch.float64)).tolist()
    return low, high


def ratio(parts_R: Tensor, wholes_R: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """A ratio of sums over requests, and the ends of its interval."""
    drawn_BR = draws(len(parts_R), seed)
    drawn_B = (drawn_BR @ parts_R.double()) / (drawn_BR @ wholes_R.double()).clamp_min(1e-30)
    return (float(parts_R.sum() / wholes_R.sum().clamp_min(1e-30)), *ends(drawn_B))
