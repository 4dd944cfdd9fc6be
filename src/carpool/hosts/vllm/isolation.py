"""How far one request may reach into another's result: which policy may run with which grouping (docs/isolation.md).

A token-local policy decides from a row alone and may always run. A group-wide one makes the rows of a group depend on
each other, so its grouping may not be wider than what the configuration allows.
"""

from __future__ import annotations

from typing import Any

from carpool.errors import CarpoolError
from carpool.hosts.engine.settings import Settings
from carpool.plans.grammar import Plan

EXACT = (
    ("weight_transfer_config", "a trainer that compares log-probabilities (weight_transfer_config)"),
    ("aux_output_config.enable_return_routed_experts", "replaying routed experts (enable_return_routed_experts)"),
)


def require_isolated(plan: Plan, settings: Settings, config: Any) -> None:
    """Refuse a plan that would let requests depend on each other further than the operator or the engine allows.

    Args:
        plan: of any layer; the kind of its policy is what counts.
        settings: with the grouping and the isolation.
        config: vLLM's configuration of the engine.

    Raises:
        CarpoolError: a group-wide policy whose grouping is wider than the isolation, or wider than a request while
            the engine promises batch invariance or exact log-probabilities: how many of a prompt's samples run in a
            step depends on how full the engine is.
    """
    if plan.policy.kind == "token":
        return
    settings.require_isolation(plan.policy)
    _refuse_batch_invariance(plan, settings, config)
    if settings.group.kind == "request":
        return
    for path, mode in EXACT:
        value = config
        for name in path.split("."):
            value = getattr(value, name, None)
        if value:
            raise CarpoolError(
                f"{mode} needs log-probabilities that do not depend on the batch, {plan.policy} makes them depend on "
                "it; use a token-local policy or group by request"
            )


def _refuse_batch_invariance(plan: Plan, settings: Settings, config: Any) -> None:
    from vllm import envs

    # how many drafts of a request run in a step depends on how full the step is
    drafts = getattr(config, "speculative_config", None) is not None
    if envs.VLLM_BATCH_INVARIANT and (settings.group.kind != "request" or drafts):
        raise CarpoolError(
            f"VLLM_BATCH_INVARIANT=1 promises results that do not depend on the batch, {plan.policy} "
            "makes them depend on it; use a token-local policy or drop the promise"
        )
