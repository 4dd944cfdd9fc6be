"""What each thread is doing with a model: the blocks that it is in, and the forward that runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import nn

from carpool.hosts.transformers.forward import Forward
from carpool.hosts.transformers.inside import Block
from carpool.hosts.transformers.known import Loop
from carpool.plans.grammar import Plan

F = TypeVar("F", bound=Callable[..., Any])


class Shares(Block, Protocol):
    """A run, as the hooks see it."""

    @property
    def plan(self) -> Plan: ...
    def here(self, function: F) -> F: ...
    def check_open(self) -> None: ...
    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Forward: ...
    def loose(self) -> Forward: ...


class Call(NamedTuple):
    """A running forward: the module that was called, its run and the state under which it shares (None is stock), and
    the frame of the call, where one can be told."""

    module: nn.Module | None
    run: Shares | None
    forward: Forward | None
    frame: FrameType | None = None

    def again(self) -> Call:
        """The same, for what is computed a second time."""
        return Call(None, self.run, None if self.forward is None else self.forward.again())


STOCK = Call(None, None, None)


class Here(threading.local):
    """One model in the present thread; a copy of the model starts anew.

    Attributes:
        runs: whose blocks the thread is in, where nothing in them can be suspended.
        calls: the forwards that are running (one, unless something calls the model from within its forward).
        loops: the decoding loops that are running, the outermost first.
        loose: the state of layers that are called outside of any forward.
        ended: the ids after the latest canvas of a denoising loop, and which of its sequences have ended.
    """

    def __init__(self) -> None:
        self.runs: list[Shares] = []
        self.calls: list[Call] = []
        self.loops: list[Loop] = []
        self.loose: Forward | None = None
        self.ended: tuple[Any, Any] = (None, None)

    def __reduce__(self) -> tuple[type[Here], tuple[()]]:
        return Here, ()
