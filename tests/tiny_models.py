"""Tiny models of every supported family, from configurations alone: random weights, no downloads."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False, "num_experts_per_tok": 2,
}  # fmt: skip
SPARSE = {"moe_intermediate_size": 16, "mlp_layer_types": ["sparse"] * 2}
SHARED = {"shared_expert_intermediate_size": 16, "moe_intermediate_size": 16, "num_experts": 8, "norm_topk_prob": True}
GROUPS = {
    "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "first_k_dense_replace": 0, "moe_intermediate_size": 16,
}  # fmt: skip
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
INDEXED = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "mlp_layer_types": ["sparse"] * 2}
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

# model type: the settings that make it small and its routing worth testing
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": True},
    "qwen2_moe": {
        "num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": False, "shared_expert_intermediate_size": 16,
    },
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8, "norm_topk_prob": False},
    "deepseek_v3": GROUPS | MLA | {"first_k_dense_replace": 1, "num_hidden_layers": 3},
    "flex_olmo": {"num_experts": 8, "norm_topk_prob": False},
    "granitemoe": {"num_local_experts": 8},
    "glm4_moe": GROUPS | {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5},
    "minimax_m2": {"num_local_experts": 8, "rotary_dim": 16},
    "gpt_oss": {"num_local_experts": 8, "layer_types": ["full_attention"] * 2},
}  # fmt: skip

# the rest of the families, which the tests of every family take too
MORE: dict[str, dict[str, Any]] = {
    "mellum": SPARSE | {"num_local_experts": 8, "norm_topk_prob": False, "layer_types": ["full_attention"] * 2},
    "qwen3_next": SHARED | LINEAR,
    "qwen4_exp_text": SHARED | LINEAR | {
        "layer_types": ["linear_attention", "indexed_attention"], "hc_lowrank": 8, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4,
    },
    "qwen3_5_moe_text": SHARED | LINEAR,
    "qwen3_vl_moe_text": {"num_local_experts": 8, "moe_intermediate_size": 16},
    "qwen3_omni_moe_text": {"num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": False},
    "qwen3_omni_moe_talker_text": {
        "num_local_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 16,
    },
    "minimax": {"num_local_experts": 8, "block_size": 8},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "deepseek_v2": GROUPS | MLA | {"topk_method": "group_limited_greedy"},
    "deepseek_ocr2_text": GROUPS | {"topk_method": "greedy", "n_group": None, "topk_group": None}
    | {"mlp_layer_types": ["sparse"] * 2},
    "mistral4": GROUPS | MLA | {"head_dim": 16},
    "ernie4_5_moe": {
        "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0,
        "moe_layer_end_index": 1,
    },
    "ernie4_5_vl_moe_text": {
        "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": [16, 16], "mlp_layer_types": ["sparse"] * 2,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [3, 3, 2]},
    },
    "longcat_flash": MLA | {
        "num_hidden_layers": 4, "ffn_hidden_size": 32, "moe_topk": 2, "n_routed_experts": 6, "zero_expert_num": 2,
        "expert_ffn_hidden_size": 16, "routed_scaling_factor": 2.5,
    },
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16,
        "layer_types": ["full_attention"] * 2, "hidden_size_per_layer_input": 0,
    },
    "granitemoeshared": {"num_local_experts": 8, "shared_intermediate_size": 16},
    "granitemoehybrid": {
        "num_local_experts": 8, "shared_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8,
    },
    "granitemoe_swa": {"num_local_experts": 8, "layer_types": ["full_attention"] * 2, "layer_rope_theta": [1e4] * 2},
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    "cohere2_moe": SPARSE | {
        "num_experts": 8, "expert_selection_fn": "sigmoid", "norm_topk_prob": True,
        "layer_types": ["full_attention"] * 2,
    },
    "openai_privacy_filter": {"num_local_experts": 8},
    "deepseek_v32": GROUPS | MLA | INDEXED | {"layer_types": ["indexed_attention"] * 2},
    "glm4_moe_lite": GROUPS | MLA | {"mlp_layer_types": ["sparse"] * 2},
    "glm4v_moe_text": GROUPS | {
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 1, 1]},
    },
    "glm_moe_dsa": GROUPS | MLA | INDEXED | {"layer_types": ["indexed_attention"] * 2, "indexer_types": ["full"] * 2},
    "glm5_next_text": GROUPS | MLA | INDEXED | {
        "qk_rope_head_dim": 0, "layer_types": ["linear_attention", "indexed_attention"], "indexer_types": ["full"] * 2,
        "linear_head_dim": 8, "linear_num_heads": 2, "index_kpool": 4,
    },
    "dots1": GROUPS | {"layer_types": ["full_attention"] * 2},
    "kimi_linear": MLA | SPARSE | {
        "num_experts": 8, "num_experts_per_token": 2, "num_expert_group": 2, "topk_group": 1, "num_shared_experts": 1,
        "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 8, "linear_num_heads": 2,
        "model_max_length": 128,
    },
    "exaone_moe": SPARSE | GROUPS | {
        "num_experts": 8, "num_shared_experts": 1, "layer_types": ["full_attention"] * 2, "sliding_window": 16,
    },
    "axk1": GROUPS | MLA,
    "axk2": GROUPS | MLA | INDEXED | {"layer_types": ["indexed_attention"] * 2, "gated_norm_rank": 8},
    "solar_open": GROUPS,
    "hy_v4": GROUPS | MLA | INDEXED | {"layer_types": ["indexed_attention"] * 2, "indexer_types": ["full"] * 2},
    "mimo_v2_flash": GROUPS | {
        "layer_types": ["full_attention"] * 2, "mlp_layer_types": ["sparse"] * 2, "v_head_dim": 16,
    },
    "nemotron_h": GROUPS | {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "use_mamba_kernels": False,
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "hy_v3": SPARSE | {"num_experts": 8, "num_shared_experts": 1},
    "afmoe": {
        "num_experts": 8, "moe_intermediate_size": 16, "num_dense_layers": 0, "num_shared_experts": 1,
        "route_scale": 1.5, "layer_types": ["full_attention"] * 2,
    },
    "lfm2_moe": {
        "num_experts": 8, "moe_intermediate_size": 16, "num_dense_layers": 0, "layer_types": ["conv", "full_attention"],
        "routed_scaling_factor": 1.5,
    },
    "minimax_m3_vl_text": {
        "num_local_experts": 8, "mlp_layer_types": ["sparse"] * 2, "layer_types": ["full_attention"] * 2,
        "dense_intermediate_size": 32, "shared_intermediate_size": 16, "rotary_dim": 8,
    },
    "step3p5": SPARSE | {
        "n_routed_experts": 8, "share_expert_dim": 16, "layer_types": ["full_attention"] * 2, "sliding_window": 16,
    },
    "laguna": SPARSE | {
        "num_experts": 8, "shared_expert_intermediate_size": 16, "num_attention_heads_per_layer": [2, 2],
        "layer_types": ["full_attention"] * 2, "moe_router_logit_softcapping": 4.0,
    },
    "deepseek_v4": {
        "n_routed_experts": 8, "moe_intermediate_size": 16, "mlp_layer_types": ["moe"] * 2,
        "layer_types": ["sliding_attention"] * 2, "o_groups": 2, "o_lora_rank": 8, "q_lora_rank": 16,
        "qk_rope_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    },
    "diffusion_gemma": {
        "text_config": COMMON | {
            "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16, "layer_types": ["full_attention"] * 2,
            "global_head_dim": 16,
        },
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1, "head_dim": 16,
        },
        "canvas_length": 8,
    },
}  # fmt: skip

# other settings of a family that make it route in another way
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe, not renormalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "deepseek_v2, no groups": ("deepseek_v2", {"topk_method": "greedy"}),
    "cohere2_moe, softmax": ("cohere2_moe", {"expert_selection_fn": "softmax"}),
    "axk2, no groups": ("axk2", {"n_group": None, "topk_group": None}),
    "lfm2_moe, no bias": ("lfm2_moe", {"use_expert_bias": False}),
}

# families with a router that is refused by name
REFUSED: dict[str, dict[str, Any]] = {
    "phimoe": {"num_local_experts": 4},
    "zaya": {"num_experts": 4, "num_experts_per_tok": 1, "layer_types": ["hybrid"] * 2, "router_hidden_size": 16},
    "inkling_text": {"n_routed_experts": 4, "moe_intermediate_size": 16},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16},
    "dbrx": {
        "d_model": 32, "n_heads": 2, "n_layers": 2, "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "jamba": {"num_experts": 4},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 32},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "doge": {"is_moe": True, "num_experts": 4},
    "nllb-moe": {"d_model": 32, "num_experts": 4, "encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 1},
    "switch_transformers": {"d_model": 32, "num_layers": 2, "num_experts": 4, "num_sparse_encoder_layers": 2},
    "vitpose_backbone": {"num_experts": 2, "part_features": 8, "image_size": [32, 32]},
}  # fmt: skip

# what the auto classes of transformers do not name: the parts of models for images and speech that route text
CLASSES = {
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel",
    "qwen3_omni_moe_talker_text": "Qwen3OmniMoeTalkerModel",
    "deepseek_ocr2_text": "DeepseekOcr2TextModel",
    "ernie4_5_vl_moe_text": "Ernie4_5_VLMoeTextModel",
    "step3p5": "Step3p7TextModel",
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion",
    "vitpose_backbone": "VitPoseBackbone",
}


def tiny_config(family: str, **changes: Any) -> Any:
    kind = transformers.CONFIG_MAPPING[family]
    return kind(**(COMMON | FAMILIES.get(family, MORE.get(family, {})) | changes))


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model with weights large enough that tokens route differently and logits differ clearly."""
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    if family in CLASSES:
        model = getattr(transformers, CLASSES[family])(config)
    else:
        autos = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText, transformers.AutoModel)
        model = next(auto for auto in autos if type(config) in auto._model_mapping).from_config(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.normal_(0, 0.1)
            elif name.endswith("per_expert_scale"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim >= 2 and tensor.is_floating_point():
                tensor.normal_(0, 0.3)
    return model.to(dtype).eval()


def tokens(rows: int = 4, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
