"""Permanent hooks and the state they read.

Compiled code ignores hooks that are added after it was compiled, but notices changed attributes, those of a thread
included: so the hooks are installed once, before compiling, and do nothing while nobody shares.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from carpool.errors import CarpoolError
from carpool.hosts.transformers import batching, denoising, generation, recompute
from carpool.hosts.transformers.forward import Forward
from carpool.hosts.transformers.forward_rows import has_rows
from carpool.hosts.transformers.here import Call, Here, Shares
from carpool.hosts.transformers.inside import innermost, running, suspendable
from carpool.hosts.transformers.layers import MoELayer, entrances, find_layers, models_around
from carpool.hosts.transformers.refused import refuse_spread
from carpool.hosts.transformers.router_check import check_on_random

LOCK = threading.RLock()  # of what is attached and open; no forward waits for it


class Attachment:
    """The hooks of one model: on every router and every experts module, and around the forwards that lead to them.

    Attributes:
        layers: the model's MoE layers.
        here: what the present thread is doing with the model.
        open: runs whose blocks are open, whoever is in them.
        wanderers: those whose code may be suspended, or go on in another thread: the call stack tells who is in them.
    """

    def __init__(self, layers: list[MoELayer]) -> None:
        self.layers = layers
        self.here = Here()
        self.open: list[Shares] = []
        self.wanderers: tuple[Shares, ...] = ()
        self._handles: list[RemovableHandle] = []
        for position, layer in enumerate(layers):
            self._handles.append(layer.router.register_forward_hook(_Reroute(self, position)))
            self._handles.append(layer.experts.register_forward_pre_hook(_Before(self, position), with_kwargs=True))
            self._handles.append(layer.experts.register_forward_hook(_Supplement(self, position), with_kwargs=True))

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: nobody shares it yet."""
        return self.__dict__ | {"open": [], "wanderers": ()}

    def watch(self, model: nn.Module, layers: list[MoELayer]) -> None:
        """Follow the forwards of the model and of its parts that lead to the layers, as the model names them."""
        modules = entrances(model, layers)
        for module in modules:
            if not any(isinstance(h, _Begin) and h.attachment is self for h in module._forward_pre_hooks.values()):
                begin, end = _Begin(self, module is modules[-1]), _End(self)
                self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                self._handles.append(module.register_forward_hook(end, always_call=True))
        for module in models_around(model, layers):
            denoising.watch(module, self.here)
            generation.watch(module, self.here)
            batching.watch(module, self.here, self.owner)
        recompute.follow(modules, self.here)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def inside(self, run: Shares, frames: dict[int, FrameType]) -> Iterator[None]:
        """What these frames call belongs to the run, for the length of a `with` block.

        Raises:
            CarpoolError: the run is over, or another one's code is running here.
        """
        with LOCK:
            run.check_open()
            outer = self.owner()
            if outer is not None and outer is not run:
                raise CarpoolError(f"this model already shares under {outer.plan}; leave that block first")
            self.open.append(run)
            run.frames.update(frames)
            wanders, runs = any(map(suspendable, frames.values())), self.here.runs
            if wanders:
                self.wanderers = (*self.wanderers, run)
            else:
                runs.append(run)
        try:
            yield
        finally:
            with LOCK:
                self.open.remove(run)
                for key in frames:
                    run.frames.pop(key, None)
                if wanders:
                    place = self.wanderers.index(run)
                    self.wanderers = self.wanderers[:place] + self.wanderers[place + 1 :]
                else:
                    runs.remove(run)
                calls = self.here.calls
                calls[:] = [call for call in calls if call.run is not run]  # of forwards that were interrupted

    def owner(self) -> Shares | None:
        """The run whose block the calling code is in."""
        if not self.wanderers:
            return self.here.runs[-1] if self.here.runs else None
        return innermost((*self.wanderers, *self.here.runs))

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], last: bool) -> None:
        """A module that leads to the layers is called: this begins a forward, unless it is part of a running one."""
        here, traced = self.here, torch.compiler.is_compiling()
        if here.calls and not traced:  # an interrupt may have ended a forward without its last hook
            alive = running([call.frame for call in here.calls if call.frame is not None])
            here.calls[:] = [call for call in here.calls if call.frame is None or id(call.frame) in alive]
        if here.calls and all(call.module is not module for call in here.calls):
            return
        run = self.owner()
        if run is not None and module.training and not traced:
            recompute.follow([module], here)
        if last or has_rows(args, kwargs):
            frame = None if traced else sys._getframe(2)  # of the module's call, which runs the hooks
            here.calls.append(Call(module, run, None if run is None else run.forward(args, kwargs), frame))

    def current(self) -> Forward | None:
        """The state of the running forward, or of a layer that is called outside of any; None is stock."""
        here = self.here
        if here.calls:
            return here.calls[-1].forward
        run = self.owner()
        here.loose = None if run is None else run.loose()
        return here.loose


class _Hook:
    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    @property
    def idle(self) -> bool:
        """Nobody shares, as far as this thread could be concerned."""
        here = self.attachment.here
        return not here.calls and not here.runs and not self.attachment.wanderers


class _Begin(_Hook):
    def __init__(self, attachment: Attachment, last: bool) -> None:
        super().__init__(attachment)
        self.last = last  # no module inside leads to the layers

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.idle:
            self.attachment.begin(module, args, kwargs, self.last)


class _End(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls = self.attachment.here.calls
        if calls and calls[-1].module is module:
            forward = calls.pop().forward
            if forward is not None and output is not None:  # None: the forward raised
                forward.end()


class _Reroute(_Hook):
    def __init__(self, attachment: Attachment, position: int) -> None:
        super().__init__(attachment)
        self.position = position

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.idle:
            return output
        forward = self.attachment.current()
        if forward is None:
            return output
        if not torch.compiler.is_compiling():
            recompute.refuse_unknown(module)
        return forward.reroute(self.position, args, output)


class _OfExperts(_Hook):
    def __init__(self, attachment: Attachment, position: int) -> None:
        super().__init__(attachment)
        self.position = position

    @property
    def forward(self) -> Forward | None:
        """Of the router that ran before these experts."""
        here = self.attachment.here
        return here.calls[-1].forward if here.calls else here.loose


class _Before(_OfExperts):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = None if self.idle else self.forward
        return None if forward is None else forward.before(self.position, args, kwargs)


class _Supplement(_OfExperts):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.idle:
            return output
        forward = self.forward
        return output if forward is None else forward.supplement(self.position, (*args, *kwargs.values()), output)


def attach(model: nn.Module) -> Attachment:
    """Install the hooks of a model once; a second call, or one with a part or a wrapper of it, returns the same.

    Call it before compiling the model. Every layer's RouteSpec is checked against its router first.

    Raises:
        CarpoolError: not a model, no MoE layer, a router that is unknown or routes otherwise than its RouteSpec
            says, expert parallelism, or a model that has some layers in common
            with another one that a policy acts on.
    """
    if not isinstance(model, nn.Module):
        raise CarpoolError(f"expected a transformers model, not {type(model).__name__}")
    model = uncompiled(model)
    with LOCK:
        layers = find_layers(model)
        found = {id(known): known for layer in layers for known in _attached(layer)}
        for known in found.values():
            if [layer.router for layer in known.layers] == [layer.router for layer in layers]:
                if not known.open:
                    known.layers = layers  # buffers may have moved
                known.watch(model, layers)
                return known
        for known in found.values():
            if known.open:
                raise CarpoolError(
                    f"{type(model).__name__} has layers of a model that already shares under {known.open[0].plan}; "
                    "leave that block first"
                )
        refuse_spread(model, [(layer.name, part) for layer in layers for part in (layer.router, layer.experts)])
        for layer in layers:
            check_on_random(layer)
        for known in found.values():
            known.remove()
        attachment = Attachment(layers)
        attachment.watch(model, layers)
    return attachment


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, for one that `torch.compile` returned."""
    inner: Any = getattr(model, "_orig_mod", None)
    return inner if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) else model


def _attached(layer: MoELayer) -> list[Attachment]:
    return [hook.attachment for hook in layer.router._forward_hooks.values() if isinstance(hook, _Reroute)]
