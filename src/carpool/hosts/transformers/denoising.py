"""Which canvases of a batch are done, while `generate` of a block-diffusion model computes them on for the others.

The model's forward is not told. Its loop knows, in two places that are watched here: it hands its denoising step the
rows that are done with this canvas, and after each canvas it learns which sequences have ended.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from carpool.errors import CarpoolError

STEP, FINALIZE = "_denoising_step", "_finalize_canvas"
NEEDED = {STEP: ("input_ids", "finished_denoising"), FINALIZE: ("input_ids", "finished_sequences")}


class Finished:
    """Watches the loop of one model.

    Attributes:
        rows_B: rows of the batch that are finished, while a step of `generate` runs; None at other times.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rows_B: Tensor | None = None
        self._ended: tuple[Any, Any] = (None, None)
        self._model = model
        for name, watched in ((STEP, _Step(self)), (FINALIZE, _Finalize(self))):
            model.__dict__[name] = watched

    def remove(self) -> None:
        for name in NEEDED:
            self._model.__dict__.pop(name, None)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One denoising step; a canvas done in an earlier step, and any of an ended sequence, is finished in it."""
        self.rows_B = kwargs["finished_denoising"]
        ids, ended_B = self._ended
        if ids is kwargs["input_ids"]:  # by identity: another call of `generate` starts from other ids
            self.rows_B = self.rows_B | ended_B
        try:
            return getattr(type(self._model), STEP)(self._model, *args, **kwargs)
        finally:
            self.rows_B = None

    def finalize(self, *args: Any, **kwargs: Any) -> Any:
        """After a canvas: the ids so far, and which sequences have ended."""
        self._ended = getattr(type(self._model), FINALIZE)(*args, **kwargs)
        return self._ended


class _Step:
    # objects, not closures: a deep copy of the model must watch itself
    def __init__(self, finished: Finished) -> None:
        self.finished = finished

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.finished.step(*args, **kwargs)


class _Finalize(_Step):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.finished.finalize(*args, **kwargs)


def watch(model: nn.Module) -> Finished | None:
    """Watch the model's denoising loop; None if it has none (an autoregressive model, or a part of a model).

    Raises:
        CarpoolError: there is a loop, but another one than this was written for.
    """
    kind = type(model)
    if not any(hasattr(kind, name) for name in NEEDED):
        return None
    for name, needed in NEEDED.items():
        parameters = inspect.signature(getattr(kind, name, lambda: None)).parameters
        missing = [parameter for parameter in needed if parameter not in parameters]
        if missing:
            raise CarpoolError(
                f"{kind.__name__}.{name} of this transformers has no parameter {missing[0]!r}, by which Carpool knows "
                "finished canvases; this version is not supported"
            )
    return Finished(model)
