"""Weights that accelerate keeps elsewhere (on the CPU, on disk) until a module runs; until then the module has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def weight(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer by its dotted name, on the device where the module computes; None where it has none. Empty
    (on the meta device) only if nobody holds its values."""
    found: Any = module
    keepers = []  # modules on the way, each with the name that the rest of the way has
    parts = name.split(".")
    for place, part in enumerate(parts):
        keepers.append((found, ".".join(parts[place:])))
        found = getattr(found, part, None)
    if not isinstance(found, Tensor) or not found.is_meta:
        return found if isinstance(found, Tensor) else None
    for holder, rest in keepers:
        hook: Any = getattr(holder, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            kept = getattr(one, "weights_map", None)
            if kept is not None and rest in kept:
                value: Tensor = kept[rest]
                return value.to(torch.device(one.execution_device))
    return found
