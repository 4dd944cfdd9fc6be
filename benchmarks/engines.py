"""vLLM engines over random weights with the layer geometry of real models, for the benchmarks.

Speed does not depend on what the weights say, only on how many there are: layers, hidden size and experts are those of
the published models, the number of layers and the vocabulary are smaller so that the model fits.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 8192
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where the benchmark can look at it
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def set_environment() -> None:
    """What vLLM has to find before it is imported."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})


@dataclass(frozen=True)
class Geometry:
    """A model's layers.

    Attributes:
        family: model type of transformers.
        layers: as many as are built by default.
        hidden, intermediate, experts, top_k: of one MoE layer.
        config: the rest of the configuration.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    config: dict[str, Any] = field(default_factory=dict)

    def expert_bytes(self, item: int) -> int:
        """Bytes of one expert's weights, `item` bytes a number."""
        return 3 * self.hidden * self.intermediate * item


GEOMETRIES = {
    "qwen3-30b-a3b": Geometry(
        "qwen3_moe", 4, 2048, 768, 128, 8,
        {"num_experts": 128, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
         "head_dim": 128, "norm_topk_prob": True, "intermediate_size": 6144},
    ),
    "olmoe-1b-7b": Geometry(
        "olmoe", 6, 2048, 1024, 64, 8,
        {"num_experts": 64, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16},
    ),
    "gpt-oss-20b": Geometry(
        "gpt_oss", 3, 2880, 2880, 32, 4,
        {"num_local_experts": 32, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
         "head_dim": 64},
    ),
    "tiny": Geometry(
        "qwen3_moe", 2, 64, 32, 32, 4,
        {"num_experts": 32, "moe_intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
         "head_dim": 32, "norm_topk_prob": True, "intermediate_size": 64},
    ),
}  # fmt: skip


def write_config(geometry: Geometry, layers: int, folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """The configuration of a model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = geometry.config | {
        "vocab_size": vocabulary, "hidden_size": geometry.hidden, "num_hidden_layers": layers,
        "num_experts_per_tok": geometry.top_k, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    }  # fmt: skip
    if geometry.family == "gpt_oss":
        given["layer_types"] = ["full_attention"] * layers
    config = AutoConfig.for_model(geometry.family, **given)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    return folder


@functools.cache
def _normal() -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randn(1 << 23, generator=generator) * 0.02, generator


def random_weight(tensor: Any, *_: Any, **__: Any) -> None:
    """Weights of a usual size in place of vLLM's dummy ones, with which all tokens look alike to the router."""
    import torch

    tensor = tensor.detach()  # the same memory
    if not torch.is_floating_point(tensor):
        return
    if tensor.dim() == 1:  # norms
        tensor.fill_(1.0)
        return
    source, generator = _normal()
    flat, size = tensor.view(-1), len(source) // 2
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        shift = int(torch.randint(size, (1,), generator=generator))
        part.copy_(source[shift : shift + len(part)])


def start(geometry: Geometry, layers: int, dtype: str, **options: Any) -> Any:
    """An `LLM` in this process.

    Args:
        geometry: of its layers.
        layers: how many.
        dtype: of weights and activations.
        options: of `LLM`.
    """
    set_environment()
    from vllm import LLM
    from vllm.model_executor.model_loader import dummy_loader

    if not hasattr(dummy_loader, "initialize_single_dummy_weight"):
        raise SystemExit("this vLLM makes dummy weights elsewhere; engines.random_weight has to follow")
    dummy_loader.initialize_single_dummy_weight = random_weight
    folder = write_config(geometry, layers, Path(tempfile.mkdtemp(prefix="carpool-bench-")))
    settings: dict[str, Any] = {
        "load_format": "dummy", "skip_tokenizer_init": True, "dtype": dtype, "enforce_eager": True, "seed": 0,
        "kv_cache_memory_bytes": 1 << 30, "max_model_len": 1024, "block_size": 32, "enable_prefix_caching": False,
    }  # fmt: skip
    llm = LLM(str(folder), **(settings | options))
    for name, tensor in llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.named_parameters():
        if tensor.dim() == 1 and name.endswith("bias"):
            tensor.data.zero_()  # as large as `random_weight` makes norms, they would make all tokens alike
    return llm


def as_json(content: Any) -> str:
    """Indented JSON with lists of numbers on one line each."""
    text = json.dumps(content, indent=1)
    return (
        re.sub(r"\[\s+([-+.\de]+(?:,\s+[-+.\de]+)*)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"
    )


def machine() -> dict[str, Any]:
    """What was measured on: processor, cache, versions, load."""
    import torch
    import vllm

    import carpool

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "last_level_cache": caches[-1].read_text().strip() if caches else "unknown",
        "isa": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in info],
        "versions": {"carpool": carpool.__version__, "vllm": vllm.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def read_bandwidth(gib: float = 1.0) -> float:
    """GB/s at which this process reads memory, the best of five passes over more than any cache holds."""
    import torch

    data = torch.ones(int(gib * (1 << 28)))
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begin)
    return data.nbytes / best / 1e9
