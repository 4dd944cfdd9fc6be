"""Once it is imported, transformers' `from_pretrained(DIR, variant="carpool")` loads checkpoints in planes.

They are read layer by layer, and no expert ever is a usual weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from carpool.artefacts.checkpoint import METHOD, planes_in
from carpool.artefacts.statistics import Statistics
from carpool.errors import CarpoolError
from carpool.experts.stored import NAMES
from carpool.hosts.transformers.layers import find_layers, identity
from carpool.hosts.transformers.planes import PlanesExperts, activation_of


@register_quantization_config(METHOD)
class PlanesConfig(QuantizationConfigMixin):
    """What `config.json` of such a checkpoint says of its experts.

    Args:
        file: with the planes, beside it. kernels: whether they compute (see `carpool.kernels.experts`).
        resident: whether they are read at all; otherwise `carpool.offload` reads what is needed.
    """

    def __init__(self, file: str = "", kernels: bool = True, resident: bool = True, **settings: Any) -> None:
        self.quant_method, self.file, self.kernels, self.resident = METHOD, file, kernels, resident
        self.__dict__.update(settings)


@register_quantizer(METHOD)
class PlanesQuantizer(HfQuantizer):
    """Puts `PlanesExperts` in the place of the experts before any weight is read, and fills them afterwards."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **given: Any) -> Any:
        folder = Path(checkpoint_files[0]).parent
        config = {"quantization_config": {"quant_method": METHOD, "file": self.quantization_config.file}}
        self._path = planes_in(config, folder)
        for layer in find_layers(model):
            activation = activation_of(layer.experts)
            if activation is None:
                raise CarpoolError(
                    f"{layer.name}: {type(layer.experts).__name__} cannot be read in planes; load the model with "
                    "carpool.hosts.transformers.load_model, which makes usual weights of them"
                )
            layer.block.add_module("experts", PlanesExperts(layer.experts, activation))
        return model

    def _process_model_after_weight_loading(self, model: Any, **given: Any) -> Any:
        assert self._path is not None
        layers = {layer.index: layer for layer in find_layers(model)}
        stats = Statistics.load(self._path, leave=NAMES)
        if not self.quantization_config.resident:
            for layer in layers.values():
                assert layer.planes is not None
                layer.planes.leave_on_disk(stats.for_layer(layer.index))
            return model
        for index, tensors in Statistics.by_layer(self._path):
            if index in layers:
                experts: Any = layers[index].experts
                experts.fill(tensors, layers[index].weight_EH.device, kernels=self.quantization_config.kernels)
        stats.check(identity(list(layers.values())))
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
