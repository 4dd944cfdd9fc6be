"""What replaces weights in vLLM while the engine runs.

Reloads, a trainer's updates and sleep say so themselves. Whoever writes into the model by its `load_weights` is noticed
too; who writes into its tensors is not.
"""

from __future__ import annotations

import functools
from typing import Any

from carpool.artefacts.identity import Sample
from carpool.hosts.engine import weights
from carpool.hosts.engine.layer import Layer

REPLACING = ("reload_weights", "update_weights", "finish_weight_update", "reset_weights")  # methods of a worker
COMPLETE = ("reload_weights", "finish_weight_update")  # of these, the ones after which all weights are there
DISCARDS = 2  # from this level of sleep on, weights are gone until somebody loads some


class Weights(weights.Weights):
    """See the module."""

    def watch(self, worker: Any, model: Any) -> None:
        """Wrap what replaces weights."""

        def draft() -> bool:
            return bool(getattr(worker, "_weight_update_is_draft", False))

        for name in REPLACING:
            setattr(worker, name, self.watched(getattr(worker, name), name in COMPLETE, draft))
        model.load_weights = self.watched(model.load_weights)
        sleep, discard = worker.sleep, worker.discard

        @functools.wraps(sleep)
        def slept(level: int = 1, *args: Any, **kwargs: Any) -> Any:
            if level >= DISCARDS:
                self.replaced()
            return sleep(level, *args, **kwargs)

        @functools.wraps(discard)
        def discarded(tags: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
            if "weights" in tags:
                self.replaced()
            return discard(tags, *args, **kwargs)

        worker.sleep, worker.discard = slept, discarded

    def _forget_sample(self, layer: Layer) -> None:
        layer.runner.routed_experts.carpool_sample = Sample(hidden=weights.UNSEEN)

    def _renew_bias(self, layer: Layer) -> None:
        """The rule holds a copy where the router's own is not in float32."""
        bias_E = getattr(layer.router, "e_score_correction_bias", None)
        if bias_E is not None and layer.spec.bias_E is not None:
            layer.spec.bias_E.copy_(bias_E.detach())
