"""Which engines and set-ups we refuse, before a model is loaded."""

from __future__ import annotations

import inspect
from typing import Any

from carpool.errors import CarpoolError
from carpool.hosts.vllm.isolation import require_isolated
from carpool.hosts.vllm.settings import Settings

TESTED = ("0.32.",)  # versions whose seams were read and run
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
    check_model(config.model_config)
    parallel = config.parallel_config
    if parallel.enable_expert_parallel and _on_cpu():
        raise CarpoolError("expert parallelism on vLLM's CPU build: its kernel ignores the expert map; leave it off")
    if parallel.data_parallel_size > 1:
        raise CarpoolError("data parallelism hands the router rows of other ranks; run one engine a replica instead")
    if config.use_v2_model_runner and not settings.allow_untested_engine:
        raise CarpoolError(
            "vLLM's V2 model runner has not been run with Carpool yet; set VLLM_USE_V2_MODEL_RUNNER=0, or "
            '"allow_untested_engine": true to try it'
        )
    policies = settings.policies
    if parallel.pipeline_parallel_size > 1 and (policies.statistics or policies.model or policies.layers):
        raise CarpoolError(
            "with pipeline parallelism no stage sees all layers, so statistics and policy files cannot be checked "
            "against the model; give a policy that needs none, or use tensor parallelism"
        )
    if config.kv_transfer_config is not None:
        raise CarpoolError(
            "a KV connector may hand what a policy computed to other requests; remove kv_transfer_config"
        )
    require_isolated(settings.policies.plan, settings, config)


def check_model(model_config: Any) -> None:
    """Refuse a kind of model whose decoding the plugin does not follow, whatever the override.

    Raises:
        CarpoolError: a diffusion language model, or one that generates nothing.
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
