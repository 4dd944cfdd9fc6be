"""Carpool: let the tokens of a batch share experts, so that batched inference of MoE models reads fewer of them.

import carpool

with carpool.share(model, "xshare(budget=16)") as run:
    model.generate(...)
print(run)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from carpool.errors import CarpoolError
    from carpool.hosts.transformers import share
    from carpool.hosts.transformers.offloaded import offload
    from carpool.models.fusion import fuse
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
    "fuse",
    "offload",
    "parse",
    "route",
    "share",
]

# imported when it is asked for: torch takes seconds, and the command line often needs none of it
_HOMES = {
    "carpool.errors": ("CarpoolError",),
    "carpool.hosts.transformers": ("share",),
    "carpool.models.fusion": ("fuse",),
    "carpool.hosts.transformers.offloaded": ("offload",),
    "carpool.plans.grammar": ("Plan", "parse"),
    "carpool.plans.pipeline": ("Outcome", "route"),
    "carpool.plans.policy_file": ("PolicyFile",),
    "carpool.routing.batch": ("Batch", "Grouping"),
    "carpool.routing.spec": ("RouteSpec", "Routing"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            globals()[name] = found = getattr(import_module(home), name)
            return found
    raise AttributeError(f"module 'carpool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
