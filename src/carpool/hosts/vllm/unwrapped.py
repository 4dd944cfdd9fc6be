"""Experts that vLLM runs without a router that Carpool could share, in a model where it shares others."""

from __future__ import annotations

from typing import Any

import torch

from carpool.errors import CarpoolError

NAMES = ("w13", "w1", "w2", "w3", "l1", "l2")  # what vLLM's weights of experts begin with, whatever the kernel


def require_all(model: torch.nn.Module, runners: list[Any]) -> None:
    """Refuse a model of whose MoE layers some have no runner.

    Args:
        model: the loaded one.
        runners: every `MoERunner` of it.

    Raises:
        CarpoolError: names the first module that holds experts of its own.
    """
    known = {id(module) for runner in runners for module in runner.modules()}
    sizes = {size for runner in runners for size in _sizes(runner)}
    listed = {id(layer) for module in model.modules() for layer in getattr(module, "moe_layers", None) or ()}
    found = [
        path
        for path, module in model.named_modules()
        if id(module) not in known and (id(module) in listed or _holds_experts(path, module, sizes))
    ]
    if found:
        raise CarpoolError(
            f"{found[0]} holds experts that vLLM runs without a router object, as does every module like it: "
            f"{len(found)} of {len(found) + len(runners)} MoE layers could not share, so none does; choose another "
            "MoE backend, or leave out the key 'carpool'"
        )


def _sizes(runner: Any) -> tuple[int, ...]:
    return int(runner.routed_experts.local_num_experts), int(runner.moe_config.num_experts)


def _holds_experts(path: str, module: torch.nn.Module, sizes: set[int]) -> bool:
    """By its own parameters: one matrix or more an expert."""
    return any(
        parameter.dim() >= 3 and parameter.shape[0] in sizes and ("expert" in path or name.startswith(NAMES))
        for name, parameter in module.named_parameters(recurse=False)
    )
