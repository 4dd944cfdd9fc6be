"""Which canvases of a batch are done, while `generate` of a block-diffusion model computes them on for the others.

The model's forward is not told. Its loop knows, in two places that are watched here: it hands its denoising step the
rows that are done with this canvas, and after each canvas it learns which sequences have ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from carpool.errors import CarpoolError
from carpool.hosts.transformers.here import Here
from carpool.hosts.transformers.known import Known

STEP, FINALIZE = "_denoising_step", "_finalize_canvas"
NEEDED = {STEP: ("input_ids", "finished_denoising"), FINALIZE: ("input_ids", "finished_sequences")}


@dataclass(frozen=True, eq=False)
class Canvases:
    """A denoising step."""

    finished_B: Tensor
    drafts: bool = False

    def known(self, kwargs: Mapping[str, Any]) -> Known:
        return Known(finished=self.finished_B)


class _Watched:
    # objects, not closures: a deep copy of the model must watch itself
    def __init__(self, model: nn.Module, here: Here) -> None:
        self.model, self.here = model, here


class _Step(_Watched):
    """One denoising step; a canvas done in an earlier step, and any of an ended sequence, is finished in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        finished_B = kwargs["finished_denoising"]
        ids, ended_B = self.here.ended
        if ids is kwargs["input_ids"]:  # by identity: another call of `generate` starts from other ids
            finished_B = finished_B | ended_B
        self.here.loops.append(Canvases(finished_B))
        try:
            return getattr(type(self.model), STEP)(self.model, *args, **kwargs)
        finally:
            self.here.loops.pop()


class _Finalize(_Watched):
    """After a canvas: the ids so far, and which sequences have ended."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.here.ended = getattr(type(self.model), FINALIZE)(*args, **kwargs)
        return self.here.ended


def watch(model: nn.Module, here: Here) -> None:
    """Watch the model's denoising loop, if it has one (an autoregressive model and a part of a model have none).

    Raises:
        CarpoolError: there is a loop, but another one than this was written for.
    """
    kind = type(model)
    if not any(hasattr(kind, name) for name in NEEDED):
        return
    for name, needed in NEEDED.items():
        parameters = inspect.signature(getattr(kind, name, lambda: None)).parameters
        missing = [parameter for parameter in needed if parameter not in parameters]
        if missing:
            raise CarpoolError(
                f"{kind.__name__}.{name} of this transformers has no parameter {missing[0]!r}, by which Carpool knows "
                "finished canvases; this version is not supported"
            )
    model.__dict__[STEP], model.__dict__[FINALIZE] = _Step(model, here), _Finalize(model, here)
