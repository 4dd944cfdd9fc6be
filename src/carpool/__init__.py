"""Carpool: let the tokens of a batch share experts, so that batched inference of MoE models reads fewer of them.

import carpool

with carpool.share(model, "xshare(budget=16)") as run:
    model.generate(...)
print(run.report())
"""

from __future__ import annotations

from typing import Any

from carpool.errors import CarpoolError
from carpool.plans.grammar import Plan, parse
from carpool.plans.pipeline import Outcome, route
from carpool.plans.policy_file import PolicyFile
from carpool.routing.batch import Batch, Grouping
from carpool.routing.spec import RouteSpec, Routing

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "CarpoolError",
    "Grouping",
    "Outcome",
    "Plan",
    "PolicyFile",
    "RouteSpec",
    "Routing",
    "parse",
    "route",
    "share",
]


def __getattr__(name: str) -> Any:
    if name == "share":  # transformers is an extra
        from carpool.hosts.transformers import share

        return share
    raise AttributeError(f"module 'carpool' has no attribute {name!r}")
