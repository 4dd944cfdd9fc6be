"""What the plugin does with families of models in SGLang, for `carpool doctor`, before any engine starts.

By what was run on CPUs (`benchmarks/sglang_coverage.py`).
"""

from __future__ import annotations

from carpool.artefacts.checkpoint import METHOD

SHARED = frozenset({"qwen3_moe"})
REFUSED: dict[str, str] = {}  # and why
NOT_RUN = frozenset[str]()  # what SGLang itself runs on GPUs only, if at all
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
