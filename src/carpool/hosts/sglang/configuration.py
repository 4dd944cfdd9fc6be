"""Where SGLang's users write Carpool's configuration."""

from __future__ import annotations

import json
from typing import Any

from carpool.hosts.engine.near_keys import warn
from carpool.hosts.engine.settings import KEY, TYPES, Settings

DENOISES = "dllm_algorithm"
TAKES = TYPES | {"voters": str}
PLACE = "json_model_override_args"  # an argument of the server, and the only one that takes an object of any keys


def settings_of(arguments: Any) -> Settings | None:
    """The settings, or None if there is no key `carpool`.

    Args:
        arguments: SGLang's `ServerArgs`.

    Raises:
        CarpoolError: see `Settings.of`.
    """
    given = getattr(arguments, PLACE, None) or "{}"
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError:
        return None  # SGLang says so itself
    if isinstance(found, dict):
        warn(found, (KEY,), PLACE, once=True)
    # where blocks are denoised, a request is one block of a pass, which is what the methods group by
    return Settings.of(found, PLACE, TAKES, None if getattr(arguments, DENOISES, None) is None else "request")
