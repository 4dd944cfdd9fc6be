"""Weights that are replaced while the engine runs: what was measured on others never routes them.

Reloads, a trainer's updates and sleep say so themselves. Whoever writes into the model by its `load_weights` is noticed
too; who writes into its tensors is not.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from carpool.artefacts.identity import Sample
from carpool.errors import CarpoolError
from carpool.hosts.engine.layer import Layer
from carpool.hosts.vllm.layers import differ
from carpool.plans.policy_file import PolicyFile

REPLACING = ("reload_weights", "update_weights", "finish_weight_update", "reset_weights")  # methods of a worker
COMPLETE = ("reload_weights", "finish_weight_update")  # of these, the ones after which all weights are there
DISCARDS = 2  # from this level of sleep on, weights are gone until somebody loads some
UNSEEN = "weights that were replaced past vLLM's own loading"


class Weights:
    """Whether the weights are those that the files describe.

    Args:
        model: the loaded one.
        policies: what the user gave, with the files.
        layers: of the model.
        changed: called when `foreign` may have changed.

    Attributes:
        foreign: why no policy may run on the weights that the model has now, or empty.
        policies: what the user gave last, with the files.
    """

    def __init__(self, model: Any, policies: PolicyFile, layers: list[Layer], changed: Callable[[], None]) -> None:
        self._model, self.policies, self._layers, self._changed = model, policies, layers, changed
        self.foreign = ""
        self._replaced = False

    def watch(self, worker: Any) -> None:
        """Wrap what replaces weights."""
        for name in REPLACING:
            setattr(worker, name, self._watched(getattr(worker, name), name in COMPLETE, worker))
        self._model.load_weights = self._watched(self._model.load_weights)
        sleep, discard = worker.sleep, worker.discard

        @functools.wraps(sleep)
        def slept(level: int = 1, *args: Any, **kwargs: Any) -> Any:
            if level >= DISCARDS:
                self._replace()
            return sleep(level, *args, **kwargs)

        @functools.wraps(discard)
        def discarded(tags: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
            if "weights" in tags:
                self._replace()
            return discard(tags, *args, **kwargs)

        worker.sleep, worker.discard = slept, discarded

    def _watched(self, replace: Callable[..., Any], settle: bool = False, worker: Any = None) -> Callable[..., Any]:
        @functools.wraps(replace)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if getattr(worker, "_weight_update_is_draft", False):
                return replace(*args, **kwargs)
            self._replace()
            result = replace(*args, **kwargs)
            if settle:
                self.settle()
                if self.foreign:
                    raise CarpoolError(self.foreign)
            return result

        return replaced

    def _replace(self) -> None:
        self._replaced = True
        for layer in self._layers:  # whoever loads them by vLLM's own loading takes another sample
            layer.runner.routed_experts.carpool_sample = Sample(hidden=UNSEEN)

    def settle(self) -> None:
        """Before a step: compare weights that were replaced since the last one with the files."""
        if not self._replaced:
            return
        self._replaced = False
        for layer in self._layers:
            _renew_bias(layer)
        cause = differ(self._model, self.policies, self._layers) if self._layers else ""
        self.foreign = f"other weights were loaded, so sharing stays off: {cause}" if cause else ""
        if self.foreign:
            logging.getLogger("vllm.carpool").error("carpool: %s", self.foreign)
        self._changed()


def _renew_bias(layer: Layer) -> None:
    """The rule holds a copy where the router's own is not in float32."""
    bias_E = getattr(layer.router, "e_score_correction_bias", None)
    if bias_E is not None and layer.spec.bias_E is not None:
        layer.spec.bias_E.copy_(bias_E.detach())
