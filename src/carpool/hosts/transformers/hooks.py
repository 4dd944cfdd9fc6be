"""Permanent hooks and the switch they read.

Compiled code ignores hooks that are added after it was compiled, but notices a changed attribute: so the hooks are
installed once, before compiling, and do nothing until `share` sets the attachment's `run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from carpool.errors import CarpoolError
from carpool.hosts.transformers.denoising import watch
from carpool.hosts.transformers.layers import MoELayer, entrance, find_layers
from carpool.hosts.transformers.router_check import check_on_random

if TYPE_CHECKING:
    from carpool.hosts.transformers.run import Run

ATTRIBUTE = "_carpool_attachment"


class Attachment:
    """The hooks of one model: on every router and every experts module, and before and after the model's forward.

    Attributes:
        layers: the model's MoE layers.
        run: what the hooks serve at the moment; None is stock.
        finished: which rows of a batch `generate` keeps denoising for nothing; None where the model's loop has none.
    """

    def __init__(self, model: nn.Module, layers: list[MoELayer]) -> None:
        self.layers = layers
        self.run: Run | None = None
        self.finished = watch(model)
        inner = entrance(model, layers)
        self._handles: list[RemovableHandle] = [
            inner.register_forward_pre_hook(_Before(self), with_kwargs=True),
            inner.register_forward_hook(_After(self)),
        ]
        for position, layer in enumerate(layers):
            self._handles.append(layer.router.register_forward_hook(_Reroute(self, position)))
            self._handles.append(layer.experts.register_forward_hook(_Supplement(self, position), with_kwargs=True))

    def remove(self) -> None:
        if self.finished is not None:
            self.finished.remove()
        for handle in self._handles:
            handle.remove()


class _Before:
    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self.attachment.run
        if run is not None:
            run.begin(args, kwargs)


class _After:
    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run = self.attachment.run
        if run is not None:
            run.end()


class _Reroute:
    def __init__(self, attachment: Attachment, position: int) -> None:
        self.attachment = attachment
        self.position = position

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run = self.attachment.run
        return output if run is None else run.reroute(self.position, args, output)


class _Supplement:
    def __init__(self, attachment: Attachment, position: int) -> None:
        self.attachment = attachment
        self.position = position

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        run = self.attachment.run
        return output if run is None else run.supplement(self.position, (*args, *kwargs.values()), output)


def attach(model: nn.Module) -> Attachment:
    """Install the hooks of a model once; a second call returns the same attachment.

    Call it before compiling the model. Every layer's RouteSpec is checked against its router first.

    Raises:
        CarpoolError: not a model, no MoE layer, a router that is unknown or routes otherwise than its RouteSpec
            says, or expert parallelism that shows the hook local expert ids.
    """
    if not isinstance(model, nn.Module):
        raise CarpoolError(f"expected a transformers model, not {type(model).__name__}")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        model = model._orig_mod
    found: Attachment | None = model.__dict__.get(ATTRIBUTE)
    layers = find_layers(model)
    if found is not None:
        if [layer.router for layer in found.layers] == [layer.router for layer in layers]:
            if found.run is None:
                found.layers = layers  # buffers may have moved
            return found
        found.remove()
    _refuse_local_ids(model)
    for layer in layers:
        check_on_random(layer)
    attachment = Attachment(model, layers)
    model.__dict__[ATTRIBUTE] = attachment
    return attachment


def _refuse_local_ids(model: nn.Module) -> None:
    distributed = getattr(getattr(model, "config", None), "distributed_config", None)
    plan = getattr(model, "ep_plan", None) or {}
    if getattr(distributed, "ep_size", 1) > 1 and "ep_router" in plan.values():
        raise CarpoolError(
            "this model's expert-parallel plan uses 'ep_router', which hides the global expert ids from Carpool; "
            "load it with the plan 'ep_dispatch_experts' or without expert parallelism"
        )
