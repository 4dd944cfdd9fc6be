"""Tiny models of every supported family, from configurations alone: random weights, no downloads."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip

# model type: the settings that make it small and its routing worth testing
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "qwen2_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 16,
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "deepseek_v3": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 4, "topk_group": 2,
        "n_shared_experts": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 1,
        "num_hidden_layers": 3, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 16, "num_key_value_heads": 2, "head_dim": 8,
    },
    "flex_olmo": {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True, "first_k_dense_replace": 0,
    },
    "minimax_m2": {"num_local_experts": 8, "num_experts_per_tok": 2, "rotary_dim": 16},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
}  # fmt: skip


def tiny_config(family: str, **changes: Any) -> Any:
    kind = transformers.CONFIG_MAPPING[family]
    return kind(**(COMMON | FAMILIES.get(family, {}) | changes))


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model with weights large enough that tokens route differently and logits differ clearly."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "e_score_correction_bias" in name:
                tensor.normal_(0, 0.1)
            elif tensor.ndim >= 2:
                tensor.normal_(0, 0.3)
    return model.to(dtype).eval()


def tokens(rows: int = 4, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
