"""Engines of SGLang with tiny models, for tests on a CPU; the models are those of `vllm_models`."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

MASK, VOCABULARY = 509, 512  # of models that are denoised; SGLang's own mask tokens would ask for large vocabularies
FAMILIES = ("qwen3_moe", "sdar_moe", "llada2")  # modules of SGLang's that tests serve


def others() -> str:
    """SGLang's other models, which take half of the time of a start to import."""
    found = find_spec("sglang")
    folder = Path("absent" if found is None or found.origin is None else found.origin).parent / "srt/models"
    return ",".join(sorted(path.stem for path in folder.glob("*.py") if path.stem not in FAMILIES))


ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "SGLANG_DISABLED_MODEL_ARCHS": others(),
}  # fmt: skip
ARGUMENTS: dict[str, Any] = {
    "device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True, "sampling_backend": "pytorch",
    "grammar_backend": "none", "disable_overlap_schedule": True, "skip_tokenizer_init": True, "dtype": "float32",
    "max_total_tokens": 2048, "max_running_requests": 8, "mem_fraction_static": 0.8, "log_level": "error",
}  # fmt: skip
NOT_COMPILED = {"compile": False}
Tokens = list[list[int]]


def engine(folder: Path, carpool: dict[str, Any] | None = None, **changes: Any) -> Any:
    """An engine that runs a saved model, with the plugin configured or not."""
    fork()
    if "dllm_algorithm" in changes:
        os.environ.setdefault("CARPOOL_MASK", str(MASK))
    import sglang

    # compiling takes longer than most tests; the server's test has it
    given = {} if carpool is None else {"json_model_override_args": json.dumps({"carpool": NOT_COMPILED | carpool})}
    return sglang.Engine(model_path=str(folder), **(ARGUMENTS | given | changes))


def fork() -> None:
    """Let SGLang's processes be forked from this one, which imports what they need: that takes a minute, once. Else
    each would take one; its own server, which has a test too, spawns them."""
    os.environ.update(ENVIRONMENT | {"CARPOOL_FORKS": "1"})
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    from sglang.srt.managers import detokenizer_manager, scheduler  # noqa: F401
    from sglang.srt.models import registry  # noqa: F401

    multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[method-assign]  # SGLang asks for "spawn"


def greedy(running: Any, prompts: Tokens, count: int, **parameters: Any) -> Tokens:
    """The tokens that an engine chooses after each prompt."""
    given = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True} | parameters
    return [one["output_ids"] for one in running.generate(input_ids=prompts, sampling_params=given)]


def replace(engine: Any, folder: Path) -> None:
    """Other weights, and nothing cached of the old ones: SGLang lets a cache be that a request may still hold."""
    engine.update_weights_from_disk(str(folder))
    for _ in range(100):
        if engine.flush_cache().success:
            return
        time.sleep(0.05)
    raise AssertionError("SGLang's cache is never free")


def report(running: Any) -> dict[str, Any]:
    """What the plugin says of itself."""
    found: dict[str, Any] = running.get_server_info()["internal_states"][0]["carpool"]
    return found


def write_sdar(folder: Path, **changes: Any) -> Path:
    """A model of the family SDAR-MoE with random weights: Qwen3-MoE's parts under a mask of blocks."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 32,
        "num_experts_per_tok": 4, "norm_topk_prob": True, "max_position_embeddings": 256, "tie_word_embeddings": False,
        "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(sizes | changes)))
    _randomise(model)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["SDARMoeForCausalLM"]}))
    return folder


def _randomise(model: Any) -> None:
    """Weights whose routers and tokens are told apart."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3 if "gate.weight" in name or "embed" in name else 0.15)
    model.lm_head.weight.data[MASK] = 0  # never predicted: SGLang, unlike `carpool.diffusion`, would take it


def write_llada2(folder: Path) -> Path:
    """A model of the family LLaDA2-MoE with random weights, beside what computes the same in transformers.

    LLaDA2's layers are those of GLM-4.5 (query and key norms, rotation of half a head, sigmoid scores with a bias,
    groups of experts, a shared expert and a dense first layer) under other names and a mask of blocks.

    Returns:
        the folder that SGLang serves; `twin` in it is the same for transformers.
    """
    from safetensors.torch import save_file
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = Glm4MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=16, n_routed_experts=32,
        num_experts_per_tok=4, n_shared_experts=1, n_group=4, topk_group=2, first_k_dense_replace=1,
        norm_topk_prob=True, routed_scaling_factor=1.0, use_qk_norm=True, attention_bias=False,
        max_position_embeddings=256, tie_word_embeddings=False, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    model = Glm4MoeForCausalLM(config)
    _randomise(model)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.rand_like(buffer) * 0.1)
    model.save_pretrained(folder / "twin")
    save_file(dict(_as_llada2(model.state_dict())), folder / "model.safetensors", metadata={"format": "pt"})
    own = json.loads((folder / "twin/config.json").read_text()) | {
        "architectures": ["LLaDA2MoeModelLM"], "num_experts": 32, "num_shared_experts": 1, "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True, "use_bias": False, "use_qkv_bias": False, "embedding_dropout": 0.0,
        "rotary_dim": 8,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(own))
    return folder


def _as_llada2(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    renamed = {
        "embed_tokens": "word_embeddings", "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm", "self_attn.k_norm": "attention.key_layernorm",
        "gate.e_score_correction_bias": "gate.expert_bias",
    }  # fmt: skip
    for name, tensor in tensors.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            yield name.replace("self_attn.q_proj", "attention.query_key_value"), torch.cat(parts)
        elif name.endswith("experts.gate_up_proj"):
            gate_EIH, up_EIH = tensor.chunk(2, 1)
            for expert in range(len(tensor)):
                yield name.replace("gate_up_proj", f"{expert}.gate_proj.weight"), gate_EIH[expert].contiguous()
                yield name.replace("gate_up_proj", f"{expert}.up_proj.weight"), up_EIH[expert].contiguous()
        elif name.endswith("experts.down_proj"):
            for expert in range(len(tensor)):
                yield name.replace("down_proj", f"{expert}.down_proj.weight"), tensor[expert].contiguous()
        elif "k_proj" not in name and "v_proj" not in name:
            yield name, tensor
