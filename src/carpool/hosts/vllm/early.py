"""What a model's configuration alone decides, before any weight is loaded; the sentences are those of the loaded model.

A number that the configuration does not give plainly decides nothing here: the layers are checked again once they are
there.
"""

from __future__ import annotations

from typing import Any

from carpool.errors import CarpoolError
from carpool.hosts.engine.fitting import check_counts
from carpool.hosts.engine.settings import Settings
from carpool.hosts.vllm.known import REFUSED, REFUSED_ON_CPU
from carpool.hosts.vllm.planes import planes_file


def require_experts(found: bool, model: str) -> None:
    """Raises CarpoolError for a model in which no MoE layer was found."""
    if not found:
        raise CarpoolError(
            f"{model} has no mixture-of-experts layer that Carpool can share (a dense model, or experts "
            "that vLLM runs without a router object); start it without the key 'carpool'"
        )


def check_configuration(model_config: Any, settings: Settings, on_cpu: bool) -> None:
    """Refuse by vLLM's configuration of a model what would be refused once its weights are there.

    Args:
        model_config: vLLM's.
        settings: the user's; `allow_untested_engine` lets families pass, whose layers are checked anyway.
        on_cpu: whether this is vLLM's CPU build.

    Raises:
        CarpoolError: a dense model, a family that is known to be refused, or a policy or files that do not fit.
    """
    text, policies = getattr(model_config, "hf_text_config", None), settings.policies
    if text is None:
        return
    experts, top_k = model_config.get_num_experts(), model_config.get_num_experts_per_tok()
    names = getattr(model_config, "architectures", None) or ["the model"]
    require_experts(bool(experts) or _mentions_experts(text), names[0])
    family = getattr(text, "model_type", "")
    cause = REFUSED.get(family) or (REFUSED_ON_CPU.get(family) if on_cpu else None)
    if cause and not settings.allow_untested_engine:
        raise CarpoolError(f"a model of the family {family} cannot be shared: {cause}; leave out the key 'carpool'")
    if experts and top_k:
        check_counts(policies, experts, top_k, planes_file(model_config))


def _mentions_experts(text: Any) -> bool:
    """Whether a configuration speaks of experts by a name that vLLM does not read their number from."""
    return any(value and ("expert" in name or "moe" in name) for name, value in text.to_dict().items())
