"""The numbers of a plan as 0-d device tensors: recorded CUDA graphs and compiled routing read them anew each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.plans.grammar import Plan
from carpool.policies.parameters import resolve_budget

SHARES = ("budget", "request_budget", "size")  # parameters where a float is a share of the experts


class Knobs:
    """A plan whose changeable numbers are tensors.

    Attributes:
        plan: the same policy and guards, over tensors.
    """

    def __init__(self, plan: Plan, num_experts: int, device: torch.device) -> None:
        self.num_experts = num_experts
        self._given = plan
        self._tensors = {
            (place, name): torch.tensor(value, device=device, dtype=_dtype(_parts(plan)[place], name))
            for (place, name), value in self._numbers(plan)
        }
        self.plan = self.over(plan, self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """The numbers, in the order of the plan's text."""
        return [*self._tensors.values()]

    @property
    def kind(self) -> str:
        """What two plans have in common that differ by their changeable numbers only."""
        return repr((self._rest(self._given), [*self._tensors]))

    def fits(self, plan: Plan) -> bool:
        """Whether `plan` differs from the given one by its changeable numbers only."""
        same_numbers = [key for key, _ in self._numbers(plan)] == [*self._tensors]
        return same_numbers and self._rest(plan) == self._rest(self._given)

    def check(self, plan: Plan) -> None:
        """Raises CarpoolError unless `plan` differs from the recorded one by its changeable numbers only."""
        if not self.fits(plan):
            raise CarpoolError(
                f"CUDA graphs hold the kind of the policy ({self._given}); only numbers such as budget, k0, tau and "
                f"threshold can change, not to {plan}; start with --enforce-eager to change the kind at run time"
            )

    def set(self, plan: Plan) -> None:
        """Copy the numbers of a checked plan to the device."""
        for key, value in self._numbers(plan):
            self._tensors[key].fill_(value)

    def _numbers(self, plan: Plan) -> Iterator[tuple[tuple[int, str], Any]]:
        for place, part in enumerate(_parts(plan)):
            for field in fields(part):
                value = getattr(part, field.name)
                if _is_knob(field, value):
                    share = isinstance(value, float) and field.name in SHARES
                    yield (place, field.name), resolve_budget(field.name, value, self.num_experts) if share else value

    def over(self, plan: Plan, tensors: Sequence[Tensor]) -> Plan:
        """The plan with these tensors for its changeable numbers."""
        parts = _parts(plan)
        for (place, name), tensor in zip(self._tensors, tensors, strict=True):
            parts[place] = _with(parts[place], name, tensor)
        return Plan(parts[0], tuple(parts[1:]))

    def _rest(self, plan: Plan) -> list[Any]:
        return [
            (type(part), [getattr(part, f.name) for f in fields(part) if not _is_knob(f, getattr(part, f.name))])
            for part in _parts(plan)
        ]


def _parts(plan: Plan) -> list[Any]:
    return [plan.policy, *plan.guards]


def _is_knob(field: Any, value: Any) -> bool:
    return "Tensor" in str(field.type) and isinstance(value, int | float | Tensor) and not isinstance(value, bool)


def _dtype(part: Any, name: str) -> torch.dtype:
    """Whole numbers stay whole; a tau of 0 may become 0.3."""
    [field] = [field for field in fields(part) if field.name == name]
    return torch.float64 if "float" in str(field.type) and name not in SHARES else torch.int64


def _with(part: Any, name: str, value: Tensor) -> Any:
    """A copy with another value, which is not checked again: a compiler could not trace the messages."""
    copy = object.__new__(type(part))
    for field in fields(part):
        object.__setattr__(copy, field.name, value if field.name == name else getattr(part, field.name))
    return copy
