"""Keys and values computed under a policy depend on the batch: no other request may find them in the prefix cache."""

from __future__ import annotations

from typing import Any

from carpool.errors import CarpoolError


def share_prompts_only(scheduler: Any) -> None:
    """Cache blocks of prompt tokens only, on this scheduler.

    Prompt rows are routed natively, so their blocks are what stock vLLM would hold. Blocks with generated tokens are
    computed under the policy and stay with their request; one that is preempted computes them again. This holds for
    as long as the plugin is configured, also while it is switched off: a request may outlive the switch.

    Raises:
        CarpoolError: a scheduler without the seam.
    """
    try:
        coordinator = scheduler.kv_cache_manager.coordinator
        cache_blocks = coordinator.cache_blocks
    except AttributeError:
        raise CarpoolError(
            f"{type(scheduler).__name__} has no KV cache coordinator, so generated tokens cannot be kept out of the "
            "prefix cache; use vLLM's own scheduler"
        ) from None

    def cache_prompt_blocks(request: Any, num_computed_tokens: int) -> None:
        # a resumed session counts its earlier output as prompt: the first length seen is the real one
        prompt = vars(request).setdefault("carpool_prompt_tokens", request.num_prompt_tokens)
        cache_blocks(request, min(num_computed_tokens, prompt))

    coordinator.cache_blocks = cache_prompt_blocks
