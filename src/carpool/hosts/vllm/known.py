"""What the plugin does with families of models, for `carpool doctor`, before any engine starts.

By what was run (`docs/results/vllm-coverage.json`), and by vLLM's code for refusals where nothing was.
"""

from __future__ import annotations

from carpool.artefacts.checkpoint import METHOD

FUNCTION = "vLLM routes it by a function of the model's own, which Carpool does not know"
EXTERNAL = "vLLM runs it by its Transformers backend, whose router sees no logits"
CPU = "vLLM's CPU build"
TESTED = "shared, as tested with a tiny model"

SHARED = frozenset({
    "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "glm4_moe",
    "qwen3_next", "flex_olmo",
})  # fmt: skip
REFUSED = {  # wherever vLLM runs
    "llama4_text": FUNCTION, "phimoe": FUNCTION, "gemma4_text": FUNCTION, "cohere2_moe": FUNCTION,
    "interns1_pro": FUNCTION, "hunyuan_v1_moe": EXTERNAL,
}  # fmt: skip
REFUSED_ON_CPU = {
    "ernie4_5_moe": f"{CPU} drops its correction bias",
    "minimax_m2": f"{CPU} knows no sigmoid without expert groups",
}
# what configurations call weights whose experts the CPU build did not run where it was tried
WITHOUT_KERNEL = frozenset({"awq", "compressed-tensors", "fp8", "gptq", "mxfp4"})


def on_cpu(family: str, method: str = "none") -> str:
    """What becomes of a model in vLLM's CPU build, in a few words.

    Args:
        family: model type.
        method: how the configuration calls the quantisation of its weights; "none" without one.
    """
    reason = REFUSED.get(family) or REFUSED_ON_CPU.get(family)
    if reason is not None:
        return f"refused: {reason}"
    if method in WITHOUT_KERNEL:
        return (
            f"not run where it was tried: {CPU} has kernels for experts in {method} on CPUs with AMX only; Carpool's "
            "part was tested with stand-ins for them"
        )
    if method == METHOD:
        return "its experts run in Carpool's own kernels, as tested with a tiny model"
    if method != "none":
        return f"not tried with weights in {method}"
    return TESTED if family in SHARED else "not tried with this family; the plugin checks every router when it loads"


def on_gpu(family: str, lost: str) -> str:
    """The same on GPUs, where Carpool's authors had none.

    Args:
        family: model type.
        lost: the fused kernel that routing in Python gives up.
    """
    if family in REFUSED:
        return f"refused: {REFUSED[family]}"
    return f"untested; routing in Python gives up {lost}"
