"""Single MoE layers of transformers with the geometry of block-diffusion models, and blocks of rows to feed them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

INPUTS = 8  # blocks that a benchmark takes in turn
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}


@dataclass(frozen=True)
class Layer:
    """An MoE layer.

    Attributes:
        family: whose block of transformers has its form.
        hidden, intermediate, experts, top_k: its sizes.
        union: experts that the real model reads for a block of 32 rows, and `source` of that number.
        config: the rest of the configuration.
    """

    family: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    union: float
    source: str
    config: dict[str, Any] = field(default_factory=dict)

    def expert_bytes(self, item: int) -> int:
        """Bytes of one expert's weights, `item` bytes a number."""
        return 3 * self.hidden * self.intermediate * item


LAYERS = {
    "llada2.0-mini": Layer(
        "deepseek_v3", 2048, 512, 256, 8, 84, "DES, arXiv 2602.00879, table 1, mean of four tasks",
        {"n_routed_experts": 256, "n_group": 8, "topk_group": 4, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
         "norm_topk_prob": True, "first_k_dense_replace": 0, **MLA},
    ),
    "sdar-30b-a3b": Layer(
        "qwen3_moe", 2048, 768, 128, 8, 55, "TEAM, arXiv 2602.08404, table 1, mean of four tasks",
        {"num_experts": 128, "norm_topk_prob": True},
    ),
    "tiny": Layer("qwen3_moe", 64, 32, 32, 4, 24, "made up", {"num_experts": 32, "norm_topk_prob": True}),
}  # fmt: skip


def build(layer: Layer, dtype: torch.dtype, seed: int) -> Any:
    """A model of this one MoE layer, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        layer.family, vocab_size=64, hidden_size=layer.hidden, num_hidden_layers=1, intermediate_size=64,
        moe_intermediate_size=layer.intermediate, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        num_experts_per_tok=layer.top_k, **layer.config,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(1 << 22, generator=generator)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
            flat, size = tensor.view(-1), len(source) // 2
            for start in range(0, len(flat) if tensor.dim() > 1 else 0, size):
                part = flat[start : start + size]
                shift = int(torch.randint(size, (1,), generator=generator))
                part.copy_(source[shift : shift + len(part)]).mul_(tensor.shape[-1] ** -0.5)
    return model.eval()


def blocks_alike(
    layer: Layer, router: Any, rows: int, dtype: torch.dtype, seed: int
) -> tuple[list[Tensor], float, float]:
    """Blocks of hidden states `[1, N, H]`, what the rows of a block have in common (a correlation), and the experts
    that the router chooses for a block, in the mean: as many as was published, as nearly as possible."""
    generator = torch.Generator().manual_seed(seed)
    common = [torch.randn(1, 1, layer.hidden, generator=generator) for _ in range(INPUTS)]
    own = [torch.randn(1, rows, layer.hidden, generator=generator) for _ in range(INPUTS)]

    def made(rho: float) -> list[Tensor]:
        return [(rho**0.5 * c + (1 - rho) ** 0.5 * o).to(dtype) for c, o in zip(common, own, strict=True)]

    def union(rho: float) -> float:
        ids = [router(block_1NH.view(rows, -1))[2] for block_1NH in made(rho)]
        return sum(len(found.unique()) for found in ids) / INPUTS

    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if union(middle) > layer.union else (low, middle)
    return made(high), high, union(high)


def spread(union: int, rows: int, layer: Layer, generator: torch.Generator) -> Tensor:
    """Ids `[N, K]`, distinct in a row, of a random set of `union` experts that are all used, about equally often."""
    union = min(max(union, layer.top_k), rows * layer.top_k, layer.experts)
    chosen = torch.randperm(layer.experts, generator=generator)[:union]
    return chosen[torch.arange(rows * layer.top_k) % union].view(rows, layer.top_k)
