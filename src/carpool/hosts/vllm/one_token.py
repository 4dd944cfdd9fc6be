"""Requests of one token (beam search sends such, and so does scoring) share nothing, which is said and counted.

They read their prompt and end, and prompts keep their native routing.
"""

from __future__ import annotations

import functools
from typing import Any

from carpool.hosts.engine.log import log
from carpool.hosts.engine.metrics import prompts_only
from carpool.hosts.vllm.metrics import labels_of


@functools.cache  # once a process
def _say() -> None:
    log().warning(
        "carpool: a request of one token came, as beam search and scoring send them: it reads its prompt and ends, and "
        "prompts keep their native routing, so such requests never share (said once; counted in "
        "carpool_requests_prompt_only)"
    )


def count_one_token(scheduler: Any) -> None:
    """Count them where requests reach this scheduler."""
    add_request, counter = scheduler.add_request, prompts_only(labels_of(scheduler.vllm_config))

    def added(request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.sampling_params is not None and request.max_tokens == 1:
            counter.inc()
            _say()
        return add_request(request, *args, **kwargs)

    scheduler.add_request = added
