"""Keys and values computed under a policy depend on the batch: no other request may find them in the radix cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def prompts_only(original: Callable[..., Any], cache: Any, request: Any, *, up_to: int, **kwargs: Any) -> None:
    """Around the radix cache's `checkpoint`: prompt tokens enter the tree, generated ones stay with their request.

    Prompt rows are routed natively, so their keys and values are what stock SGLang would hold. This holds for as long
    as the plugin is configured, also while it is switched off: a request may outlive the switch.
    """
    original(cache, request, up_to=up_to if request.is_dllm() else min(up_to, len(request.origin_input_ids)), **kwargs)
