"""Follows the engine's model runner: who the rows are is known before each forward pass and forgotten after it.

vLLM has two model runners. V1 runs every forward pass through `_model_forward`. V2 (the default on GPUs) replays a
recorded graph without calling the model, so there the rows are filled when its inputs are prepared; sampling parameters
are seen when requests are added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from carpool.hosts.engine.step_rows import Requests, Rows


def follow(runner: Any, rows: Rows, on: Callable[[], bool], after: Callable[[], None]) -> None:
    """Wrap a runner of either kind.

    Args:
        runner: vLLM's.
        rows: to fill.
        on: whether policies are on.
        after: called after every forward pass of a batch, while its rows are still known.
    """
    if hasattr(runner, "_model_forward"):
        _follow_v1(runner, rows, on, after)
    else:
        _follow_v2(runner, rows, on, after)


def drafter(runner: Any) -> Any:
    """What loads a draft model, or None."""
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)


def _follow_v1(runner: Any, rows: Rows, on: Callable[[], bool], after: Callable[[], None]) -> None:
    forward = runner._model_forward

    def followed_forward(*args: Any, **kwargs: Any) -> Any:
        if on():
            rows.fill(requests_v1(runner), _num_rows(*args, **kwargs))
        try:
            result = forward(*args, **kwargs)
            after()
        finally:
            rows.clear()
        return result

    runner._model_forward = followed_forward


def requests_v1(runner: Any) -> Requests:
    """The batch that a V1 runner is about to run.

    A request decodes if its prompt is computed and it runs its last token and the draft tokens after it; anything else
    is a recomputation after a preemption.
    """
    batch = runner.input_batch
    n = batch.num_reqs
    lengths = np.diff(runner.query_start_loc.np[: n + 1])
    drafts = np.fromiter((len(ids) for ids in batch.spec_token_ids[:n]), np.int64, n)
    computed = batch.num_computed_tokens_cpu[:n]
    again = (lengths > drafts + 1) | (computed + lengths - drafts < batch.num_tokens_no_spec[:n])
    prefill = (computed < batch.num_prompt_tokens[:n]) | again
    return Requests(lengths, prefill, [runner.requests[name].sampling_params for name in batch.req_ids[:n]])


def _follow_v2(runner: Any, rows: Rows, on: Callable[[], bool], after: Callable[[], None]) -> None:
    add, prepare, execute = runner.add_requests, runner.prepare_inputs, runner.execute_model
    parameters: dict[str, Any] = {}

    def followed_add(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        for name in scheduled.finished_req_ids:
            parameters.pop(name, None)
        for request in scheduled.scheduled_new_reqs:  # also those that come back after a preemption
            parameters[request.req_id] = request.sampling_params
        return add(scheduled, *args, **kwargs)

    def followed_prepare(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        if on():
            rows.fill(requests_v2(batch, parameters), batch.num_tokens_after_padding)
        return batch

    def followed_execute(*args: Any, **kwargs: Any) -> Any:
        try:
            result = execute(*args, **kwargs)
            if rows.expected:
                after()
        finally:
            rows.clear()
        return result

    runner.add_requests, runner.prepare_inputs = followed_add, followed_prepare
    runner.execute_model = followed_execute


def requests_v2(batch: Any, parameters: dict[str, Any]) -> Requests:
    """The batch that a V2 runner is about to run. What it calls prefill holds tokens computed again as well."""
    n = batch.num_reqs
    lengths = np.diff(batch.query_start_loc_np[: n + 1])
    drafts = batch.num_draft_tokens_per_req
    drafts = np.zeros(n, np.int64) if drafts is None else drafts[:n]
    prefill = batch.is_prefilling_np[:n] | (lengths > drafts + 1)
    return Requests(lengths, prefill, [parameters[name] for name in batch.req_ids])


def _num_rows(input_ids: Any = None, positions: Any = None, intermediate_tensors: Any = None,
              inputs_embeds: Any = None, **_: Any) -> int:  # fmt: skip
    """Rows of a forward pass, padding included, from the arguments of `_model_forward`."""
    if input_ids is not None:
        return len(input_ids)
    return len(inputs_embeds) if inputs_embeds is not None else int(positions.shape[-1])
