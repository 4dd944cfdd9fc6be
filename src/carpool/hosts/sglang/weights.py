"""SGLang's ways of replacing weights while it runs, those included that do not come by the model's own loading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from carpool.hosts.engine import weights
from carpool.hosts.engine.layer import Layer
from carpool.hosts.sglang.arm import around

UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
PAST_THE_MODEL = ("update_weights_from_tensor", "update_weights_from_ipc")  # the others call its `load_weights`


class Weights(weights.Weights):
    """See the module."""

    def watch(self, model: Any) -> None:
        """Notice what replaces weights."""
        model.load_weights = self.watched(model.load_weights)
        for name in PAST_THE_MODEL:
            around(f"{UPDATER}.{name}", _updated)

    def _renew_bias(self, layer: Layer) -> None:
        """The rule holds a copy where the router's own is not in float32."""
        bias_E = layer.router.topk_config.correction_bias
        if bias_E is not None and layer.spec.bias_E is not None:
            layer.spec.bias_E.copy_(bias_E.detach())


def _updated(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    host = getattr(updater.get_model_runner(), "carpool", None)
    if host is not None:
        host.weights.replaced()
    return original(updater, *args, **kwargs)
