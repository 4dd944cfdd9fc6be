"""The names of policies: built-in ones, and those of other packages (entry points of the group `carpool.policies`)."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from carpool.errors import CarpoolError
from carpool.policies.base import Policy

ENTRY_POINTS = "carpool.policies"
_registry: dict[str, type[Policy]] = {}


def register(policy: type[Policy]) -> type[Policy]:
    """Class decorator: make a policy known under its `name`.

    Raises:
        CarpoolError: not a policy's dataclass, no snake_case name, no paper, no docstring, an unknown kind, or a name
            that is taken.
    """
    if not (isinstance(policy, type) and issubclass(policy, Policy) and is_dataclass(policy)):
        raise CarpoolError(f"{policy!r} is no policy; subclass carpool.policies.Policy as a frozen dataclass")
    name = getattr(policy, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise CarpoolError(f"{policy.__name__}.name is {name!r}; a policy needs a snake_case name")
    if not getattr(policy, "paper", "") or not policy.__doc__:
        raise CarpoolError(f"{policy.__name__} needs a `paper` and a docstring that says what it does")
    if policy.kind not in ("token", "group"):
        raise CarpoolError(f"{policy.__name__}.kind is {policy.kind!r}; use 'token' or 'group'")
    if _registry.setdefault(name, policy) is not policy:
        raise CarpoolError(f"the policy name {name!r} is taken by {_registry[name].__name__}")
    return policy


@cache
def _installed() -> tuple[EntryPoint, ...]:
    """Scanning all installed distributions takes a tenth of a second: once per process."""
    return tuple(entry_points(group=ENTRY_POINTS))


def policies() -> dict[str, type[Policy]]:
    """All policies by name, those of installed packages included."""
    import carpool.policies  # noqa: F401  the built-in ones register on import

    for point in _installed():
        if point.name not in _registry:
            try:
                policy = register(point.load())
            except Exception as error:  # whatever another package's import raises
                raise CarpoolError(f"the policy {point.name!r} of {point.value!r} does not load: {error}") from error
            if policy.name != point.name:
                raise CarpoolError(f"the entry point {point.name!r} gives a policy named {policy.name!r}; rename one")
    return dict(sorted(_registry.items()))


def policy_class(name: str) -> type[Policy]:
    """Raises CarpoolError with the known names if there is no such policy."""
    known = policies()
    if name not in known:
        raise CarpoolError(f"unknown policy {name!r}; known policies: {', '.join(known)}")
    return known[name]
