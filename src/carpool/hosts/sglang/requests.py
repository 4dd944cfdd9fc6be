"""Requests in SGLang's front end: refused there, and their samples known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from carpool.hosts.engine.request_keys import check_request, mark_samples
from carpool.hosts.sglang.arm import apply, around


def follow_requests() -> None:
    """Look at the parameters of every request when SGLang verifies them."""
    around("sglang.srt.sampling.sampling_params.SamplingParams.verify", _verified)
    apply()


def _verified(original: Callable[..., Any], parameters: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(parameters, *args, **kwargs)
    check_request(parameters)  # its error is a `ValueError`, which SGLang's server answers with 400
    mark_samples(parameters)
    return result
