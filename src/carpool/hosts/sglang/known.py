"""What the plugin does with families of models in SGLang, for `carpool doctor`, before any engine starts.

By what was run (`tests/test_sglang_families.py`), on CPUs.
"""

from __future__ import annotations

from carpool.artefacts.checkpoint import METHOD

SHARED = frozenset({"qwen3_moe"})
TESTED = "shared, as tested with a tiny model on a CPU; untested on GPUs"
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
    return TESTED if family in SHARED else UNTRIED
