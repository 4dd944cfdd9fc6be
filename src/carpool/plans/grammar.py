"""The text form of a policy and its guards: `xshare(budget=32) | protect([3, 7]) | floor(0.3)`.

The text is parsed, never evaluated: names, literals and `|` are all there is.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any

from torch import Tensor

from carpool.errors import CarpoolError
from carpool.plans.guards import GUARDS, Bits, Bound, DecodeOnly, Guard, MinBatch, Regret, ShortCircuit
from carpool.policies import Policy, policies
from carpool.policies.registry import policy_class
from carpool.routing.spec import ALL_BITS

PLANES = "planes_shape"  # the statistic that says at which depths experts are stored
MAX_TEXT = 10_000  # characters; deeper nesting than any policy needs would exhaust the parser's stack
SHOWN = 200  # characters of a text that an error repeats


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
    if len(text) > MAX_TEXT:
        raise CarpoolError(f"a policy text of {len(text)} characters; {MAX_TEXT} is the limit")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        parts = [_call(node, text) for node in _split(tree)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, CarpoolError):
            raise
        raise CarpoolError(
            f"cannot read the policy text {_short(text)}: write name(parameter=value) | guard(...)"
        ) from None
    first, *rest = (_build(name, args, kwargs) for name, args, kwargs in parts)
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
        raise CarpoolError(f"{twice} is given twice in {_short(text)}: write each guard once")
    return Plan(first, tuple(guards))


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def _split(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_split(node.left), *_split(node.right)]
    return [node]


def _call(node: ast.expr, text: str) -> tuple[str, list[Any], dict[str, Any]]:
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise CarpoolError(f"cannot read {_short(ast.unparse(node))} in {_short(text)}: write name(parameter=value)")
    kwargs: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in kwargs:
            raise CarpoolError(f"cannot read {_short(ast.unparse(node))}: each parameter once, as name=value")
        kwargs[keyword.arg] = _literal(keyword.value, node.func.id)
    return node.func.id, [_literal(argument, node.func.id) for argument in node.args], kwargs


def _literal(node: ast.expr, name: str) -> Any:
    for part in ast.walk(node):  # however deep: Python refuses to print a number of thousands of digits
        if isinstance(part, ast.Constant) and isinstance(part.value, int | float) and not part.value <= 2**53:
            raise CarpoolError(f"a number beyond 2**53 in {_short(name)}; no parameter takes one")
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):  # TypeError: an unhashable key
        raise CarpoolError(
            f"{_short(ast.unparse(node))} is not a literal; values are numbers, strings and lists"
        ) from None


def _build(name: str, args: list[Any], kwargs: dict[str, Any]) -> Policy | Guard:
    if name in GUARDS:
        kind: type[Any] = GUARDS[name]
    elif name in policies():
        kind = policy_class(name)
    else:
        known = ", ".join((*policies(), *GUARDS))
        raise CarpoolError(f"unknown policy or guard {_short(name)}; known names: {known}")
    names = [field.name for field in fields(kind)]
    unknown = [given for given in kwargs if given not in names]
    if unknown:
        raise CarpoolError(f"{name} has no parameter {_short(unknown[0])}; it takes: {', '.join(names) or 'none'}")
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
            f"{name} takes {', '.join(names) or 'no parameters'}; given: {_short(str(args or kwargs))}"
        ) from None
