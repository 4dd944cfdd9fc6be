"""The numbers of a plan as 0-d device tensors: recorded CUDA graphs read them anew at every replay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.grammar import Plan
from carpool.policies.base import resolve_budget

SHARES = ("budget", "size")  # parameters where a float is a share of the experts


class Knobs:
    """A plan whose changeable numbers are tensors.

    Attributes:
        plan: the same policy and guards, over tensors.
    """

    def __init__(self, plan: Plan, num_experts: int, device: torch.device) -> None:
        self.num_experts = num_experts
        self._given = plan
        self._tensors = {
            key: torch.tensor(value, device=device, dtype=torch.float64 if isinstance(value, float) else torch.int64)
            for key, value in self._numbers(plan)
        }
        self.plan = self._over_tensors(plan)

    def check(self, plan: Plan) -> None:
        """Raises CarpoolError unless `plan` differs from the recorded one by its changeable numbers only."""
        if self._rest(plan) != self._rest(self._given) or [key for key, _ in self._numbers(plan)] != [*self._tensors]:
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

    def _over_tensors(self, plan: Plan) -> Plan:
        parts = _parts(plan)
        for (place, name), tensor in self._tensors.items():
            parts[place] = replace(parts[place], **{name: tensor})
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
