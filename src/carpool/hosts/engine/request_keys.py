"""What a request says of itself in its sampling parameters: whether it shares at all, and with whom.

A client writes the first three keys. The fourth is the plugin's own: the front end, where the samples of one request
are still one request, gives them a random key in common and drops whatever a client wrote there. So siblings are known
by who asked for them: equal text makes none, and neither does a request's id, which clients may choose.
"""

from __future__ import annotations

import secrets
from collections.abc import Hashable
from typing import Any

from carpool.errors import CarpoolError
from carpool.hosts.engine.near_keys import warn

OPT_OUT = "carpool"
TENANT = "carpool_tenant"
PROMPT = "carpool_prompt"
SAMPLES = "_carpool_samples"
PLACES = ("extra_args", "custom_params")  # in the sampling parameters of vLLM and of SGLang


def check_request(sampling_params: Any) -> None:
    """Refuse a request that says something of Carpool that means nothing; warn of keys that are nearly ours.

    Raises:
        CarpoolError: names key and value. vLLM's server answers 400 with it.
    """
    given = _extra(sampling_params)
    switch = given.get(OPT_OUT, "on")
    if switch not in ("on", "off"):
        raise CarpoolError(
            f'a request says "{OPT_OUT}": {switch!r}; write "off" for native routing, or leave the key out: the policy '
            "is the server's"
        )
    for name in (TENANT, PROMPT):
        value = given.get(name, "")
        if value not in ("", None) and _key(value) is None:
            raise CarpoolError(f'a request says "{name}": {value!r}; give a text or a whole number, or leave it out')
    warn(given, (OPT_OUT, TENANT, PROMPT, SAMPLES), "a request's extra_args (vllm_xargs)", once=True)


def opted_out(sampling_params: Any) -> bool:
    """Whether a request asked for native routing with `extra_args={"carpool": "off"}`.

    The front end refuses any other value but "on"; one that came past it counts as off: what we do not understand must
    not change a user's result.
    """
    return _extra(sampling_params).get(OPT_OUT, "on") != "on"


def tenant_of(sampling_params: Any) -> tuple[type, str | int] | None:
    """Whose request it is, by `extra_args={"carpool_tenant": "name"}`; None without a text or whole number there.

    What cannot be a key makes the request nobody's: it shares with no stranger by mistake.
    """
    return _key(_extra(sampling_params).get(TENANT))


def samples_of(sampling_params: Any, isolation: str) -> Hashable | None:
    """What the samples of one prompt have in common; None for a request without siblings.

    A caller who asks for samples one by one names the prompt, `extra_args={"carpool_prompt": "name"}`. Who guesses the
    name joins, so it counts only among requests that may depend on each other anyway: a tenant's own where the
    isolation is `tenant`, all where it is `batch`, and none where it is narrower.
    """
    prompt, tenant = _key(_extra(sampling_params).get(PROMPT)), tenant_of(sampling_params)
    if prompt is not None and (isolation == "batch" or (isolation == "tenant" and tenant is not None)):
        return tenant, prompt
    return _key(_extra(sampling_params).get(SAMPLES))


def group_key(sampling_params: Any, group: str, isolation: str) -> Hashable | None:
    """What the requests of one group have in common, grouped by `tenant` or `prompt`; None for one that is alone.

    Without a tenant a request is grouped by its prompt: the narrower group.
    """
    tenant = tenant_of(sampling_params) if group == "tenant" else None
    return ("tenant", tenant) if tenant is not None else samples_of(sampling_params, isolation)


def mark_samples(parameters: Any) -> None:
    """Give the samples of a request of an engine's front end their key, or drop what a client wrote in its place.

    Args:
        parameters: a request's own, or None, before it is split into one a sample; each of them inherits these.
    """
    given = _extra(parameters)
    if parameters is None or (parameters.n == 1 and SAMPLES not in given):
        return
    kept = {name: value for name, value in given.items() if name != SAMPLES}
    made = kept | ({SAMPLES: secrets.token_hex(16)} if parameters.n > 1 else {}) or None
    setattr(parameters, next(name for name in PLACES if hasattr(parameters, name)), made)


def _extra(sampling_params: Any) -> dict[str, Any]:
    return next((given for name in PLACES if (given := getattr(sampling_params, name, None))), {})


def _key(value: Any) -> tuple[type, str | int] | None:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return None
    return type(value), value
