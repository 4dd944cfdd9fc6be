"""What vLLM makes of a configuration with experts in planes; a class of a module, for it is sent to other processes."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from carpool.artefacts.checkpoint import METHOD
from carpool.hosts.vllm.planes import method_class, planes_file


class PlanesConfig(QuantizationConfig):
    """Experts have Carpool's method, everything else is as it would be without quantisation."""

    def get_name(self) -> Any:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # what the kernels are compiled for in the tests

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PlanesConfig:
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.models.utils import extract_layer_index

        if not isinstance(layer, RoutedExperts):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        config = get_current_vllm_config()
        path, device = planes_file(config.model_config), torch.device(config.device_config.device)
        return method_class()(layer.moe_config, path, extract_layer_index(prefix), device)
