"""Continuous batching runs its forwards in a thread of its own: one that is made in a block belongs to the block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from carpool.hosts.transformers.here import Shares

INIT, LOOP = "init_continuous_batching", "_run_generation_loop"


class _Init:
    # an object, not a closure: a deep copy of the model must watch itself
    def __init__(self, model: nn.Module, owner: Callable[[], Shares | None]) -> None:
        self.model, self.owner = model, owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        manager = getattr(type(self.model), INIT)(self.model, *args, **kwargs)
        manager.__dict__.pop(LOOP, None)  # a manager that was kept may be bound to an earlier block
        run = self.owner()
        if run is not None and hasattr(manager, LOOP):
            manager.__dict__[LOOP] = run.here(getattr(manager, LOOP))
        return manager


def watch(model: nn.Module, owner: Callable[[], Shares | None]) -> None:
    """Watch who makes the model's managers of continuous batching."""
    if hasattr(type(model), INIT):
        model.__dict__[INIT] = _Init(model, owner)
