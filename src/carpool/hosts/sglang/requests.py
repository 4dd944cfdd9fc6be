"""Requests in SGLang's front end: refused there, and their samples known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from carpool.errors import CarpoolError
from carpool.hosts.engine.request_keys import check_request, mark_samples
from carpool.hosts.sglang.arm import apply, around


class RequestError(CarpoolError, ValueError):
    """SGLang's server answers a `ValueError` with 400."""


def follow_requests() -> None:
    """Look at the parameters of every request when SGLang verifies them."""
    around("sglang.srt.sampling.sampling_params.SamplingParams.verify", _verified)
    apply()


def _verified(original: Callable[..., Any], parameters: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(parameters, *args, **kwargs)
    try:
        check_request(parameters)
    except CarpoolError as error:
        raise RequestError(str(error)) from None
    mark_samples(parameters)
    return result
