"""Weights that are replaced while an engine runs: what was measured on others never routes them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from carpool.errors import CarpoolError
from carpool.hosts.engine.fitting import Gates, differ
from carpool.hosts.engine.layer import Layer
from carpool.hosts.engine.log import log
from carpool.plans.policy_file import PolicyFile

UNSEEN = "weights that were replaced past the engine's own loading"


class Weights:
    """Whether the weights are those that the files describe.

    Args:
        policies: what the user gave, with the files.
        layers: of the model.
        gates: asked for the gates' weights as they are now.
        changed: called when `foreign` may have changed.

    Attributes:
        foreign: why no policy may run on the weights that the model has now, or empty.
        policies: what the user gave last, with the files.
    """

    def __init__(
        self, policies: PolicyFile, layers: list[Layer], gates: Callable[[], Gates], changed: Callable[[], None]
    ) -> None:
        self.policies, self._layers, self._gates, self._changed = policies, layers, gates, changed
        self.foreign = ""
        self._replaced = False

    def watched(
        self, replace: Callable[..., Any], settle: bool = False, passes: Callable[[], bool] = bool
    ) -> Callable[..., Any]:
        """A function that replaces weights, noticed.

        Args:
            replace: the engine's own.
            settle: all weights are there after it.
            passes: whether the weights are none of the target model's, asked at each call.
        """

        @functools.wraps(replace)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if passes():
                return replace(*args, **kwargs)
            self.replaced()
            result = replace(*args, **kwargs)
            if settle:
                self.settle()
                if self.foreign:
                    raise CarpoolError(self.foreign)
            return result

        return replaced

    def replaced(self) -> None:
        """Weights are about to be replaced."""
        self._replaced = True
        for layer in self._layers:  # whoever loads them by the engine's own loading takes another sample
            self._forget_sample(layer)

    def settle(self) -> None:
        """Before a step: compare weights that were replaced since the last one with the files."""
        if not self._replaced:
            return
        self._replaced = False
        for layer in self._layers:
            self._renew_bias(layer)
        cause = differ(self.policies, self._layers, self._gates) if self._layers else ""
        self.foreign = f"other weights were loaded, so sharing stays off: {cause}" if cause else ""
        if self.foreign:
            log().error("carpool: %s", self.foreign)
        self._changed()

    def _forget_sample(self, layer: Layer) -> None:
        """Where the engine's loading keeps one for `Layer.sample`."""

    def _renew_bias(self, layer: Layer) -> None:
        """Where the rule holds a copy of the engine's."""
