"""A tiny model in float64, prompts and settings for the tests of block diffusion."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_model

from carpool import share
from carpool.diffusion import Decoding, Generation, Session, generate

MASK = 63
EXPERTS, TOP_K = 8, 2


def exact_model(**changes: Any) -> Any:
    """In float64, so that two ways to the same logits choose the same tokens."""
    model = tiny_model("qwen3_moe", dtype=torch.float64, **changes)
    model.set_experts_implementation("eager")  # the grouped kernels have no float64
    return model


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, MASK, (length,), generator=torch.Generator().manual_seed(100 * seed + length))


def settings(**changes: Any) -> Decoding:
    return Decoding(**({"block": 4, "mask_token": MASK, "threshold": 0.2, "max_new": 10} | changes))


def run_with(
    model: Any, prompts: list[torch.Tensor], decoding: Decoding, plan: str | None = None, *, group: str = "request",
    share_commits: bool = False, **given: Any,
) -> Generation:  # fmt: skip
    if plan is None:
        return generate(Session(model, prompts, decoding.block), prompts, decoding, **given)
    with share(model, plan, group=group) as run:
        session = Session(model, prompts, decoding.block, run=run, share_commits=share_commits)
        return generate(session, prompts, decoding, **given)


def shown(generation: Generation) -> list[list[int]]:
    return [tokens.tolist() for tokens in generation.tokens]
