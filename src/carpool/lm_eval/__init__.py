"""Model types for lm-evaluation-harness: any of its tasks under a policy, in transformers and in vLLM.

import carpool.lm_eval                     # or `carpool lm-eval ...`, with the harness's own command line
lm_eval.simple_evaluate(model="carpool", model_args={"pretrained": MODEL, "policy": "xshare(budget=16)"}, ...)

The harness looks for no plugins; importing this module tells it of the types `carpool` and `carpool-vllm`.
"""

from __future__ import annotations

from carpool.errors import CarpoolError

TYPES = {
    "carpool": "carpool.lm_eval.in_transformers:CarpoolLM",
    "carpool-vllm": "carpool.lm_eval.in_vllm:CarpoolVLLM",
}


def register() -> None:
    """Tell the harness of `TYPES`; a second call changes nothing.

    Raises:
        CarpoolError: the harness is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401 - the harness fills its registry once, where it is empty
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise CarpoolError(f"lm-evaluation-harness is not there ({error}): pip install 'carpool[lm-eval]'") from None
    for name, target in TYPES.items():
        if name not in model_registry:
            model_registry.register(name, target=target)


register()
