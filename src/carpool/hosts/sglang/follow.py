"""Who the rows of SGLang's next forward pass are, from the batch that its scheduler made.

A request that was retracted reads its tokens anew in an `EXTEND` batch, as prompts are read. In a mixed batch the
requests that decode stand behind those that read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from carpool.hosts.engine.step_rows import Requests

MARK = "carpool_requests"  # of SGLang's requests, kept on the batch that is forwarded


def remembered(original: Callable[..., Any], kind: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `ForwardBatch.init_new`: what is forwarded knows the requests that it was made of."""
    forward_batch = original(kind, batch, *args, **kwargs)
    decoding = {id(request) for request in batch.decoding_reqs or ()}
    setattr(forward_batch, MARK, [(request, id(request) in decoding) for request in batch.reqs])
    return forward_batch


def requests_of(forward_batch: Any) -> Requests | None:
    """The requests of a batch that decodes token by token or reads prompts; None where it has none (capture, idle)."""
    marked: list[tuple[Any, bool]] = getattr(forward_batch, MARK, [])
    if not marked:
        return None
    mode, count = forward_batch.forward_mode, len(marked)
    if mode.is_decode() or mode.is_target_verify():
        rows = len(forward_batch.input_ids) // count
        lengths, prefill = np.full(count, rows), np.zeros(count, np.bool_)
    else:
        lengths = np.asarray(forward_batch.extend_seq_lens_cpu, np.int64)
        prefill = np.asarray([not decodes for _, decodes in marked], np.bool_)
    return Requests(lengths, prefill, [request.sampling_params for request, _ in marked])
