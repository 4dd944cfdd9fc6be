"""Which code is inside a `with` block: what the block has called, however deep, and nothing else.

The call stack says it. Other threads and tasks have stacks of their own, and a generator or coroutine that was
suspended inside its block is on no stack while others run. What shall be inside from elsewhere is bound to the block.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch

from carpool.errors import CarpoolError

SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR | inspect.CO_ITERABLE_COROUTINE


class Block(Protocol):
    """What is open while a `with` block is."""

    @property
    def frames(self) -> dict[int, FrameType]:
        """By id: what these frames call is inside."""
        ...


B = TypeVar("B", bound=Block)
F = TypeVar("F", bound=Callable[..., Any])


def entered_from(frame: FrameType | None) -> dict[int, FrameType]:
    """The frames whose callees are inside a block that this frame enters: its own (or its caller's, if it is a function
    of contextlib that enters the block for somebody), and those that called it, up to the first that can be suspended:
    what that one's caller does meanwhile is outside."""
    frames: dict[int, FrameType] = {}
    while (frame := _past_library(frame)) is not None:
        frames[id(frame)] = frame
        if suspendable(frame):
            break
        frame = frame.f_back
    return frames


def suspendable(frame: FrameType) -> bool:
    """Is it a generator's or a coroutine's?"""
    return bool(frame.f_code.co_flags & SUSPENDABLE)


@torch.compiler.disable
def innermost(blocks: Sequence[B]) -> B | None:
    """The block that the caller is in; of several, the one that was called last."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for block in blocks:
            if id(frame) in block.frames:
                return block
        frame = frame.f_back
    return None


@torch.compiler.disable
def running(frames: Iterable[FrameType]) -> set[int]:
    """Those of the frames, by id, that the calling code was called from."""
    wanted, found = {id(one) for one in frames}, set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if id(frame) in wanted:
            found.add(id(frame))
        frame = frame.f_back
    return found


def bound(function: F, inside: Callable[[FrameType], AbstractContextManager[None]]) -> F:
    """The function with its frame inside a block whenever it runs.

    Raises:
        CarpoolError: an asynchronous generator; later, a function that returns a coroutine or generator of its own
            instead of running.
    """
    if inspect.isasyncgenfunction(function):
        raise CarpoolError(f"{function.__name__} is an asynchronous generator; bind the coroutine that consumes it")
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            with inside(sys._getframe()):
                return await function(*args, **kwargs)

        return coroutine  # type: ignore[return-value]
    if inspect.isgeneratorfunction(function):

        @wraps(function)
        def generator(*args: Any, **kwargs: Any) -> Any:
            with inside(sys._getframe()):
                return (yield from function(*args, **kwargs))

        return generator  # type: ignore[return-value]

    @wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        with inside(sys._getframe()):
            made = function(*args, **kwargs)
        if inspect.iscoroutine(made) or inspect.isgenerator(made) or inspect.isasyncgen(made):
            raise CarpoolError(f"{function} returned a {type(made).__name__}, which has yet to run; bind what makes it")
        return made

    return plain  # type: ignore[return-value]


def _past_library(frame: FrameType | None) -> FrameType | None:
    """The frame, or the first of its callers that is neither contextlib's nor a generator that contextlib drives: such
    a one is suspended while the block that it makes is open."""
    while frame is not None:
        outer: FrameType | None = frame
        while outer is not None and suspendable(outer) and not _of_library(outer):
            outer = outer.f_back
        if outer is None or not _of_library(outer):
            return frame
        frame = outer.f_back
    return None


def _of_library(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__") == "contextlib"
