"""Which engines and set-ups we refuse, before a model is loaded."""

from __future__ import annotations

import inspect
from typing import Any

from carpool.artefacts.checkpoint import planes_settings
from carpool.errors import CarpoolError
from carpool.hosts.engine.settings import Settings
from carpool.hosts.vllm.early import check_configuration
from carpool.hosts.vllm.isolation import require_isolated
from carpool.plans.policy_file import PolicyFile

TESTED = ("0.32.", "0.33.")  # versions whose seams were read and run
SEAMS = {  # what we replace or call, and the parameters we rely on
    "fused_moe.layer.create_fused_moe_router": ("top_k", "global_num_experts"),
    "fused_moe.runner.moe_runner.MoERunner.__init__": ("layer_name", "router", "routed_experts"),
    "fused_moe.router.base_router.BaseRouter._compute_routing": ("hidden_states", "router_logits", "indices_type"),
}


def check_engine(config: Any, settings: Settings) -> None:
    """Refuse a `VllmConfig` under which the policy would be bypassed, unsound or untested.

    Raises:
        CarpoolError: names the cause and what to change.
    """
    _check_version(settings)
    _check_seams()
    check_model(config.model_config, settings)
    parallel = config.parallel_config
    if parallel.enable_expert_parallel and _on_cpu():
        raise CarpoolError("expert parallelism on vLLM's CPU build: its kernel ignores the expert map; leave it off")
    if parallel.data_parallel_size > 1:
        raise CarpoolError("data parallelism hands the router rows of other ranks; run one engine a replica instead")
    _check_rows(config)
    _check_decoding(config)
    check_files(config, settings.policies)
    if config.kv_transfer_config is not None:
        raise CarpoolError(
            "a KV connector may hand what a policy computed to other requests; remove kv_transfer_config"
        )
    require_isolated(settings.policies.plan, settings, config)


def check_files(config: Any, policies: PolicyFile) -> None:
    """Refuse files where nobody could tell that they are of the model that runs.

    Raises:
        CarpoolError: statistics or a policy file with adapters, or they or planes under pipeline parallelism.
    """
    if getattr(config, "lora_config", None) is not None and (policies.statistics or policies.model):
        raise CarpoolError(
            "adapters (LoRA) make other weights of those that statistics and policy files were made for; leave out "
            "--enable-lora, or give a policy that needs none"
        )
    staged = config.parallel_config.pipeline_parallel_size > 1
    if staged and planes_settings(getattr(config.model_config, "hf_config", None)) is not None:
        raise CarpoolError(
            "with pipeline parallelism no stage sees all layers of a checkpoint in planes, whose file describes all of "
            "them; use tensor parallelism"
        )
    if staged and (policies.statistics or policies.model or policies.layers):
        raise CarpoolError(
            "with pipeline parallelism no stage sees all layers, so statistics and policy files cannot be checked "
            "against the model; give a policy that needs none, or use tensor parallelism"
        )


def _check_rows(config: Any) -> None:
    """Refuse what splits a batch, or decides on the device whose rows are whose."""
    parallel, speculative = config.parallel_config, getattr(config, "speculative_config", None)
    if getattr(parallel, "use_ubatching", False):
        raise CarpoolError(
            "micro-batches split the rows that would share; leave out --enable-dbo and --ubatch-size to use Carpool"
        )
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise CarpoolError(
            "context parallelism of prompts gives every rank rows of its own; set prefill_context_parallel_size to 1"
        )
    if getattr(speculative, "enable_adaptive_verification", False):
        raise CarpoolError(
            "adaptive verification decides on the device which request a draft token's row belongs to, which Carpool "
            "does not follow; set enable_adaptive_verification to false"
        )


def _check_decoding(config: Any) -> None:
    """Refuse what decodes by kernels that route for themselves, while prompts still go through the routers."""
    chosen = config.additional_config.get("decode_backend", "auto") if config.additional_config else "auto"
    if chosen != "auto":
        raise CarpoolError(
            f"decode_backend={chosen!r} decodes by kernels that route for themselves, past every policy; leave "
            "decode_backend out of additional_config"
        )
    if getattr(getattr(config, "kernel_config", None), "monokernel", False):
        raise CarpoolError(
            "--monokernel decodes a layer by one kernel that routes for itself, past every policy; leave it out"
        )


def check_model(model_config: Any, settings: Settings) -> None:
    """Refuse a kind of model whose decoding the plugin does not follow, whatever the override, and what the model's
    configuration says against the settings.

    Raises:
        CarpoolError: a diffusion language model, one that generates nothing, or see `check_configuration`.
    """
    if getattr(model_config, "runner_type", "generate") == "pooling":
        raise CarpoolError(
            "a pooling model (embeddings, scores, rewards) only reads prompts, and these keep their native routing: "
            "there is nothing to share; leave out the key 'carpool'"
        )
    if getattr(model_config, "is_diffusion", False):
        raise CarpoolError(
            "vLLM decodes diffusion models in its V2 model runner only, which needs a GPU and which Carpool does not "
            "follow through denoising; use `carpool.share` in transformers, or leave out the key 'carpool'"
        )
    check_configuration(model_config, settings, _on_cpu())


def _check_version(settings: Settings) -> None:
    import vllm

    if not vllm.__version__.startswith(TESTED) and not settings.allow_untested_engine:
        raise CarpoolError(
            f"vLLM {vllm.__version__} was not tested with this version of Carpool (tested: {', '.join(TESTED)}x); "
            'set "allow_untested_engine": true to try it'
        )


def _check_seams() -> None:
    from vllm.model_executor.layers.fused_moe import layer
    from vllm.model_executor.layers.fused_moe.router import base_router
    from vllm.model_executor.layers.fused_moe.runner import moe_runner

    found = (layer.create_fused_moe_router, moe_runner.MoERunner.__init__, base_router.BaseRouter._compute_routing)
    for (name, needed), function in zip(SEAMS.items(), found, strict=True):
        parameters = inspect.signature(function).parameters
        missing = [parameter for parameter in needed if parameter not in parameters]
        if missing:
            raise CarpoolError(f"{name} of this vLLM has no parameter {missing[0]!r}; this version is not supported")


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
