"""The text form of a policy and its guards: `xshare(budget=32) | protect([3, 7]) | floor(0.3)`.

The text is parsed, never evaluated: names, literals and `|` are all there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any

from torch import Tensor

from carpool.artefacts.calls import read_calls, short
from carpool.errors import CarpoolError
from carpool.plans.guards import GUARDS, Bits, Bound, DecodeOnly, Guard, MinBatch, Regret, ShortCircuit
from carpool.policies import Policy, policies
from carpool.policies.registry import policy_class
from carpool.routing.spec import ALL_BITS

PLANES = "planes_shape"  # the statistic that says at which depths experts are stored


@dataclass(frozen=True)
class Plan:
    """A policy with its guards, in the order they were written; bounds always act last, the floor first."""

    policy: Policy
    guards: tuple[Guard, ...] = ()

    def __post_init__(self) -> None:
        ordered = sorted(self.guards, key=lambda guard: (isinstance(guard, Bound), isinstance(guard, Regret)))
        object.__setattr__(self, "guards", tuple(ordered))

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises CarpoolError if the plan is impossible for a layer with `E` experts, `K` a token."""
        self.policy.check(num_experts, top_k)
        for guard in self.guards:
            guard.check(num_experts, top_k)

    @property
    def reads_depths(self) -> bool:
        """Whether it says how deep experts are read, for which they have to be stored in planes."""
        return self.policy.reads_depths or any(guard.reads_depths for guard in self.guards)

    def required_stats(self) -> tuple[str, ...]:
        """Names of the per-layer statistics that policy and guards need."""
        return (*self.policy.required_stats(), *((PLANES,) if self.reads_depths else ()))

    def prepare(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `Inputs.stats` shall hold for a layer, derived once from the statistics file's tensors.

        Raises:
            CarpoolError: experts that are not stored at a depth that a guard asks for.
        """
        given = self.policy.prepare(stats)
        if not self.reads_depths:
            return given
        offered = stats[PLANES][3:]
        caps = [guard.depth for guard in self.guards if isinstance(guard, Bits)]
        for depth in caps:
            if depth != ALL_BITS and depth not in offered.tolist():
                raise CarpoolError(
                    f"bits({depth}): the experts are stored at {offered.tolist()} bits; use one of these"
                )
        deepest = given.get("deepest", offered.amax())
        return given | {"deepest": deepest.clamp_max(min([ALL_BITS, *caps]))}

    def for_serving(self) -> Plan:
        """With the defaults of serving (`decode_only`, `min_batch(2)`, `short_circuit`) where they are not given."""
        defaults = (DecodeOnly(), MinBatch(2), ShortCircuit())
        missing = [guard for guard in defaults if not any(isinstance(given, type(guard)) for given in self.guards)]
        return Plan(self.policy, (*missing, *self.guards))

    @cached_property
    def least_voters(self) -> int:
        """Voters of a batch below which the plan changes nothing, so that it need not run."""
        if self.policy.kind == "token" or self.policy.alone:
            return 1
        return max([1, *(guard.voters for guard in self.guards if isinstance(guard, MinBatch))])

    def __str__(self) -> str:
        return " | ".join(str(part) for part in (self.policy, *self.guards))


def parse(text: str | Policy | Plan) -> Plan:
    """A plan from its text form (policies and plans pass through).

    Raises:
        CarpoolError: not a text, syntax that is not the grammar's, unknown names or parameters, bad values.
    """
    if isinstance(text, Plan):
        return text
    if isinstance(text, Policy):
        return Plan(text)
    if not isinstance(text, str) or not text.strip():
        raise CarpoolError(f"a policy is a text such as 'xshare(budget=32) | floor(0.3)', not {text!r}")
    first, *rest = (_build(*call) for call in read_calls(text, "the policy text"))
    if not isinstance(first, Policy):
        raise CarpoolError(f"{first} is a guard; a policy text starts with a policy ({', '.join(policies())})")
    guards: list[Guard] = []
    for part in rest:
        if not isinstance(part, Guard):
            raise CarpoolError(f"{part} is a second policy; only guards ({', '.join(GUARDS)}) may follow the first")
        guards.append(part)
    names = [guard.name for guard in guards]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CarpoolError(f"{twice} is given twice in {short(text)}: write each guard once")
    return Plan(first, tuple(guards))


def _build(name: str, args: list[Any], kwargs: dict[str, Any]) -> Policy | Guard:
    if name in GUARDS:
        kind: type[Any] = GUARDS[name]
    elif name in policies():
        kind = policy_class(name)
    else:
        known = ", ".join((*policies(), *GUARDS))
        raise CarpoolError(f"unknown policy or guard {short(name)}; known names: {known}")
    names = [field.name for field in fields(kind)]
    unknown = [given for given in kwargs if given not in names]
    if unknown:
        raise CarpoolError(f"{name} has no parameter {short(unknown[0])}; it takes: {', '.join(names) or 'none'}")
    try:
        return kind(*args, **kwargs)
    except TypeError:
        needed = [one.name for one in fields(kind) if one.default is MISSING][len(args) :]
        missing = [one for one in needed if one not in kwargs]
        if missing:
            raise CarpoolError(
                f"{name} needs {missing[0]!r}: write {name}({missing[0]}=...); it takes: {', '.join(names)}"
            ) from None
        raise CarpoolError(
            f"{name} takes {', '.join(names) or 'no parameters'}; given: {short(str(args or kwargs))}"
        ) from None
