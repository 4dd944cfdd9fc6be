"""Engines of SGLang with tiny models, for tests on a CPU; the models are those of `vllm_models`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

MASK = 151669  # SGLang's mask token for SDAR
ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ARGUMENTS: dict[str, Any] = {
    "device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True, "sampling_backend": "pytorch",
    "grammar_backend": "none", "disable_overlap_schedule": True, "skip_tokenizer_init": True, "dtype": "float32",
    "max_total_tokens": 2048, "max_running_requests": 8, "mem_fraction_static": 0.8, "log_level": "error",
}  # fmt: skip
Tokens = list[list[int]]


def engine(folder: Path, carpool: dict[str, Any] | None = None, **changes: Any) -> Any:
    """An engine that runs a saved model, with the plugin configured or not."""
    os.environ.update(ENVIRONMENT)
    import sglang

    given = {} if carpool is None else {"json_model_override_args": json.dumps({"carpool": carpool})}
    return sglang.Engine(model_path=str(folder), **(ARGUMENTS | given | changes))


def greedy(running: Any, prompts: Tokens, count: int, **parameters: Any) -> Tokens:
    """The tokens that an engine chooses after each prompt."""
    given = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True} | parameters
    return [one["output_ids"] for one in running.generate(input_ids=prompts, sampling_params=given)]


def report(running: Any) -> dict[str, Any]:
    """What the plugin says of itself."""
    found: dict[str, Any] = running.get_server_info()["internal_states"][0]["carpool"]
    return found


def write_sdar(folder: Path, **changes: Any) -> Path:
    """A model of the family SDAR-MoE with random weights: Qwen3-MoE's parts under a mask of blocks."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": MASK + 3, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 32,
        "num_experts_per_tok": 4, "norm_topk_prob": True, "max_position_embeddings": 256, "tie_word_embeddings": False,
        "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(sizes | changes)))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "gate.weight" in name or "embed" in name else 0.15)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["SDARMoeForCausalLM"]}))
    return folder
