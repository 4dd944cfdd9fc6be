"""What the plugin does with families of models in SGLang, for `carpool doctor`, before any engine starts.

By what was run on CPUs (`benchmarks/sglang_coverage.py`).
"""

from __future__ import annotations

from carpool.artefacts.checkpoint import METHOD

SHARED = frozenset({
    "cohere2_moe", "glm4_moe", "granitemoe", "llada2_moe", "mixtral", "olmoe", "qwen3_moe", "sdar_moe",
})  # fmt: skip
REFUSED = {"llama4_text": "it routes by a function of its own, which Carpool does not know"}
NOT_RUN = frozenset(
    {
        "deepseek_v2",
        "deepseek_v3",
        "flex_olmo",
        "gemma4_text",
        "gpt_oss",
        "hunyuan_v1_moe",
        "minimax_m2",
        "phimoe",
        "qwen2_moe",
        "qwen3_next",
    }
)  # what SGLang itself runs on GPUs only, if at all
TESTED = "shared, as tested with a tiny model on a CPU; untested on GPUs"
GPUS = "not run: SGLang does not run this family on a CPU; on GPUs the plugin checks every router when it loads"
UNTRIED = "not tried with this family; the plugin checks every router when it loads"


def in_sglang(family: str, method: str = "none") -> str:
    """What becomes of a model in SGLang, in a few words.

    Args:
        family: model type.
        method: how the configuration calls the quantisation of its weights; "none" without one.
    """
    if method == METHOD:
        return "not run: SGLang has no kernels for experts in planes; serve it with vLLM"
    if method != "none":
        return f"not tried with weights in {method}"
    if family in REFUSED:
        return f"refused: {REFUSED[family]}"
    return TESTED if family in SHARED else GPUS if family in NOT_RUN else UNTRIED
