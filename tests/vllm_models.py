"""Tiny mixture-of-experts models with random weights for the real engine, in the formats that vLLM loads.

vLLM's own dummy weights (about 1e-3) make all tokens look alike, so that a dead policy goes unnoticed: these give
every token its own router logits. Sizes are multiples of 32, as the CPU kernels need.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from carpool import Batch

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where a test can look at it
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
VOCABULARY = 512
EXPERTS, TOP_K = 32, 4
BUDGET = 8
POLICY = f"xshare(budget={BUDGET})"
SHARING = {"policy": POLICY, "isolation": "batch"}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "num_experts_per_tok": TOP_K,
}
MLA = {
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "moe_intermediate_size": 32, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 0, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": EXPERTS, "head_dim": 32, "norm_topk_prob": True},
    "qwen2_moe": {"moe_intermediate_size": 32, "num_experts": EXPERTS, "shared_expert_intermediate_size": 32},
    "mixtral": {"num_local_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": 32},
    "deepseek_v2": MLA | {"topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "deepseek_v3": MLA | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 32, "layer_types": ["full_attention"] * 2},
    "granitemoe": {"num_local_experts": EXPERTS, "intermediate_size": 32},
    "glm4_moe": {
        "moe_intermediate_size": 32, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "head_dim": 32,
        "first_k_dense_replace": 0, "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
    },
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_intermediate_size": 32, "head_dim": 32},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": TOP_K, "head_dim": 32},
    "qwen3_next": {
        "num_experts": EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "head_dim": 64,
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "norm_topk_prob": True,
    },
    "phimoe": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "llama4_text": {
        "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size": 32, "intermediate_size_mlp": 64,
        "head_dim": 32, "interleave_moe_layer_step": 1,
    },
    "gemma4_text": {
        "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": TOP_K, "moe_intermediate_size": 32,
        "layer_types": ["full_attention"] * 2, "hidden_size_per_layer_input": 0, "head_dim": 32, "global_head_dim": 32,
    },
    "cohere2_moe": {
        "num_experts": EXPERTS, "moe_intermediate_size": 32, "mlp_layer_types": ["sparse"] * 2, "head_dim": 32,
        "expert_selection_fn": "sigmoid", "norm_topk_prob": True, "layer_types": ["full_attention"] * 2,
    },
    "minimax_m2": {"num_local_experts": EXPERTS, "intermediate_size": 32, "head_dim": 32, "rotary_dim": 32},
    "flex_olmo": {"num_experts": EXPERTS, "intermediate_size": 32, "pad_token_id": 1, "eos_token_id": 0},
    "qwen3": {"head_dim": 32},  # dense
}  # fmt: skip


def set_environment() -> None:
    """What the engine has to find before `vllm` is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def v2() -> bool:
    """Whether engines run by vLLM's V2 model runner: asked for where Triton is at hand (see the Makefile)."""
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


def write_model(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a model of a family with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family] | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "gate" in name or "router" in name else 0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.rand_like(buffer) * 0.1)
    model.save_pretrained(folder)
    return folder


_alive: list[Any] = []  # an engine that is collected takes the process groups of the others with it


@functools.cache
def qwen3() -> Path:
    """One Qwen3-MoE model for all tests of a process."""
    folder = tempfile.mkdtemp(prefix="carpool-qwen3-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_model("qwen3_moe", Path(folder))


@functools.cache
def stock_engine() -> Any:
    """An engine with the plugin loaded and not configured."""
    return engine(qwen3(), None)


@functools.cache
def shared_engine() -> Any:
    """An engine with `POLICY`."""
    return engine(qwen3(), SHARING)


@functools.cache
def _hasten() -> None:
    """Leave out what vLLM does anew for every engine of a process."""
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    if v2():
        from vllm.v1.sample.ops import topk_topp_sampler

        topk_topp_sampler.HAS_TRITON = False  # its kernel cannot be interpreted; there is another form
    # it looks at a model's class in a process of its own, which takes longer than all the rest
    registry._run_in_subprocess = lambda function: function()
    # it scans all modules for kernels; once is enough, and once numba is imported the scan fails
    current_platform.register_triton_kernel_overrides = functools.cache(
        current_platform.register_triton_kernel_overrides
    )


def engine(model: Path, carpool: dict[str, Any] | None, **options: Any) -> Any:
    """An `LLM` on one thread, small enough to hold several in one process, where they stay until it ends."""
    set_environment()
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # the engine without the plugin needs it too, for models as small as these
    from vllm import LLM

    _hasten()
    settings: dict[str, Any] = {
        "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 24,
        "max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 16, "block_size": 32,
        # compiling takes longer than most tests
        "additional_config": {} if carpool is None else {"carpool": {"compile": False} | carpool},
    }  # fmt: skip
    _alive.append(LLM(str(model), **(settings | options)))
    return _alive[-1]


def host(llm: Any) -> Any:
    """The plugin's state in an engine that runs in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.carpool


def runner(llm: Any) -> Any:
    """The engine's model runner."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def prompts(count: int, length: int = 6, seed: int = 0) -> list[list[int]]:
    """Random prompts of token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()


def generate(llm: Any, given: list[list[int]], tokens: int = 8, **options: Any) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log-probabilities, one pair a prompt."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=tokens, temperature=0, detokenize=False, logprobs=0, ignore_eos=True, **options
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in given], parameters, use_tqdm=False)
    results = []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        chosen = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, ids, strict=True)]
        results.append((ids, chosen))
    return results


@dataclass
class Call:
    """One call of one layer's router: what went in and what came out."""

    layer: Any
    logits_NE: torch.Tensor
    batch: Batch
    outcome: Any


def watch(llm: Any) -> list[Call]:
    """Record every routed call of an engine from now on."""
    calls: list[Call] = []

    def observe(layer: Any, logits_NE: torch.Tensor, outcome: Any) -> None:
        live = layer.step.rows.batch(len(logits_NE))
        values = {f.name: getattr(live, f.name) for f in fields(Batch)}
        copy = Batch(**{name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in values.items()})
        calls.append(Call(layer, logits_NE.clone(), copy, outcome))

    host(llm).step.observer = observe
    return calls


def assert_bounded(calls: list[Call], budget: int) -> None:
    """Fails unless every call stays within the budget and some rows were changed."""
    assert calls, "no router call was seen"
    for call in calls:
        exempt_NE = call.outcome.inputs.native_NE & (call.batch.exempt_N & call.batch.real_N).unsqueeze(-1)
        read = call.outcome.routing.ids_NK[call.batch.real_N].unique()
        assert len(read) <= budget + int(exempt_NE.any(0).sum())
    assert sum(int(call.outcome.changed_N.sum()) for call in calls) > 0, "no row was changed"
