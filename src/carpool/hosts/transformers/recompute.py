"""Gradient checkpointing: what a layer computes again in the backward pass belongs to the forward in which it was
computed first, wherever and whenever the backward pass runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn

from carpool.errors import CarpoolError
from carpool.hosts.transformers.here import STOCK, Here

FUNCTION = "_gradient_checkpointing_func"
CHECKPOINT = "torch.utils.checkpoint"


class _Checkpoint:
    """In the place of a layer's checkpointing function."""

    def __init__(self, checkpoint: Callable[..., Any], here: Here) -> None:
        self.checkpoint, self.here = checkpoint, here

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(_Computed(function, self.here), *args, **kwargs)


class _Computed:
    """What is checkpointed: called once in the forward, and again in the backward pass."""

    def __init__(self, function: Callable[..., Any], here: Here) -> None:
        self.function, self.here = function, here
        self.call = here.calls[-1] if here.calls else STOCK
        self.first = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.first:
            self.first = False
            return self.function(*args, **kwargs)
        self.here.calls.append(self.call.again())
        try:
            return self.function(*args, **kwargs)
        finally:
            self.here.calls.pop()


def follow(modules: Sequence[nn.Module], here: Here) -> None:
    """Follow the checkpoints of these modules and of all in them."""
    for outer in modules:
        for module in outer.modules():
            function = module.__dict__.get(FUNCTION)
            if function is not None and not (isinstance(function, _Checkpoint) and function.here is here):
                function = function.checkpoint if isinstance(function, _Checkpoint) else function
                module.__dict__[FUNCTION] = _Checkpoint(function, here)


def refuse_unknown(router: nn.Module) -> None:
    """Raises CarpoolError where the calling code will be computed again by a checkpoint that is not followed."""
    if not router.training and not torch.is_grad_enabled():
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _Computed.__call__.__code__:
        if frame.f_globals.get("__name__") == CHECKPOINT:
            raise CarpoolError(
                "a checkpoint of your own will compute these rows again in the backward pass, where nobody knows whose "
                "they are; use model.gradient_checkpointing_enable(), which Carpool follows"
            )
        frame = frame.f_back
