"""Which engines and set-ups we refuse, before a model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from carpool.errors import CarpoolError
from carpool.experts.pruned import COUNTS
from carpool.hosts.engine.fitting import check_counts
from carpool.hosts.engine.settings import Settings
from carpool.plans.grammar import Plan
from carpool.plans.policy_file import PolicyFile

TESTED = ("0.5.23",)  # versions whose seams were read and run
REFUSED: tuple[tuple[Callable[[Any], Any], str], ...] = (  # what is set, and why no policy can run with it
    (lambda cfg: cfg.attn_dp_size > 1 or cfg.enable_dp_attention,
     "DP attention hands the router rows of other ranks; leave out --attn-dp-size and --enable-dp-attention"),
    (lambda cfg: cfg.dp_size > 1, "data parallelism is not followed; run one server a replica, without --dp-size"),
    (lambda cfg: cfg.ep_size > 1,
     "expert parallelism is not followed: what one rank saves, another may read; leave out --ep-size"),
    (lambda cfg: cfg.moe_a2a_backend not in ("none", None),
     "an all-to-all backend for experts splits the rows that would share; leave out --moe-a2a-backend"),
    (lambda cfg: cfg.enable_eplb or cfg.ep_num_redundant_experts or cfg.init_expert_location != "trivial"
     or cfg.ep_dispatch_algorithm,
     "expert placement (EPLB) lets the router name physical copies, not experts; leave out --enable-eplb, "
     "--ep-num-redundant-experts, --init-expert-location and --ep-dispatch-algorithm"),
    (lambda cfg: cfg.enable_two_batch_overlap or cfg.enable_single_batch_overlap,
     "overlapped micro-batches split the rows that would share; leave out --enable-two-batch-overlap and "
     "--enable-single-batch-overlap"),
    (lambda cfg: cfg.enable_pdmux,
     "PD multiplexing reads prompts layer by layer beside decoding; leave out --enable-pdmux"),
    (lambda cfg: cfg.disaggregation_mode != "null",
     "disaggregated serving hands keys and values to other servers; leave out --disaggregation-mode"),
    (lambda cfg: cfg.enable_lmcache or cfg.enable_flexkv or cfg.enable_hierarchical_cache,
     "a cache outside of the device may hand what a policy computed to other requests; leave out "
     "--enable-hierarchical-cache, --enable-lmcache and --enable-flexkv"),
    (lambda cfg: cfg.enable_streaming_session or cfg.enable_session_radix_cache,
     "sessions keep generated tokens for later requests; leave out --enable-streaming-session and "
     "--enable-session-radix-cache"),
    (lambda cfg: cfg.enable_torch_compile,
     "torch.compile would trace one batch's routing into the model; leave out --enable-torch-compile"),
    (lambda cfg: cfg.enable_amd_monokernel or cfg.enable_nvidia_megakernel,
     "a monokernel decodes a layer by routing for itself, past every policy; leave out --enable-amd-monokernel and "
     "--enable-nvidia-megakernel"),
    (lambda cfg: cfg.elastic_ep_backend is not None,
     "elastic expert parallelism is not followed; leave out --elastic-ep-backend"),
    (lambda cfg: cfg.is_embedding,
     "an embedding model only reads prompts, and these keep their native routing: there is nothing to share"),
    (lambda cfg: cfg.dllm_algorithm == "Gemma4Renoise",
     "DiffusionGemma has no mask token by which its passes could be told apart here; share it in transformers with "
     "carpool.share"),
    (lambda cfg: cfg.device == "cpu" and cfg.speculative_algorithm,
     "speculative decoding in SGLang needs operations that only GPUs have; leave out --speculative-algorithm"),
)  # fmt: skip
PARAMETERS = {  # of what we hook
    "sglang.srt.layers.moe.topk.select_experts": ("hidden_states", "router_logits", "topk_config"),
    "sglang.srt.model_executor.model_runner.ModelRunner.forward": ("forward_batch",),
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint": ("req", "up_to"),
}


def check_engine(arguments: Any, settings: Settings) -> None:
    """Refuse a `ServerArgs` under which the policy would be bypassed, unsound or untested.

    Raises:
        CarpoolError: names the cause and what to change.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    _check_version(settings)
    cfg = resolving_view(arguments)
    check_arguments(cfg)
    check_files(cfg, settings.policies)
    _check_model(arguments, settings.policies)
    for plan in settings.policies.plans:
        require_isolated(plan, settings, cfg)
        if plan.reads_depths:
            raise CarpoolError(f"{plan} reads experts at depths, which SGLang's kernels do not; serve it with vLLM")


def check_arguments(cfg: Any) -> None:
    """Raises CarpoolError for a server whose resolved arguments hold something of `REFUSED`."""
    for holds, sentence in REFUSED:
        if holds(cfg):
            raise CarpoolError(sentence)


def check_files(cfg: Any, policies: PolicyFile) -> None:
    """Refuse files where nobody could tell that they are of the model that runs.

    Raises:
        CarpoolError: statistics or a policy file with adapters, or under pipeline parallelism.
    """
    if cfg.enable_lora and (policies.statistics or policies.model):
        raise CarpoolError(
            "adapters (LoRA) make other weights of those that statistics and policy files were made for; leave out "
            "--enable-lora, or give a policy that needs none"
        )
    if cfg.pp_size > 1 and (policies.statistics or policies.model or policies.layers):
        raise CarpoolError(
            "with pipeline parallelism no stage sees all layers, so statistics and policy files cannot be checked "
            "against the model; give a policy that needs none, or use tensor parallelism"
        )


def require_isolated(plan: Plan, settings: Settings, cfg: Any) -> None:
    """Refuse a plan that would let requests depend on each other further than the operator or the engine allows.

    Raises:
        CarpoolError: a group-wide policy whose grouping is wider than the isolation, or than a request while SGLang
            promises results that do not depend on the batch.
    """
    if plan.policy.kind == "token":
        return
    settings.require_isolation(plan.policy)
    if settings.group.kind == "request":
        return
    for holds, mode in (
        (cfg.enable_deterministic_inference, "--enable-deterministic-inference promises"),
        (cfg.enable_return_routed_experts, "replaying routed experts (--enable-return-routed-experts) needs"),
    ):
        if holds:
            raise CarpoolError(
                f"{mode} results that do not depend on the batch, {plan.policy} makes them depend on it; use a "
                "token-local policy or group by request"
            )


def _check_model(arguments: Any, policies: PolicyFile) -> None:
    """Raises CarpoolError for what does not fit by the model's configuration, before it is loaded."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    text = getattr(model_config_of(arguments), "hf_text_config", None)
    experts = next((value for name in COUNTS if (value := getattr(text, name, None))), None)
    top_k = getattr(text, "num_experts_per_tok", None)
    if experts and top_k:
        check_counts(policies, int(experts), int(top_k))


def check_seams() -> None:
    """Raises CarpoolError if what we hook takes other parameters than we rely on."""
    import pkgutil

    for name, needed in PARAMETERS.items():
        parameters = inspect.signature(pkgutil.resolve_name(name)).parameters
        missing = [parameter for parameter in needed if parameter not in parameters]
        if missing:
            raise CarpoolError(f"{name} of this SGLang has no parameter {missing[0]!r}; this version is not supported")


def _check_version(settings: Settings) -> None:
    import sglang

    if not sglang.__version__.startswith(TESTED) and not settings.allow_untested_engine:
        raise CarpoolError(
            f"SGLang {sglang.__version__} was not tested with this version of Carpool (tested: {', '.join(TESTED)}); "
            'set "allow_untested_engine": true to try it'
        )
