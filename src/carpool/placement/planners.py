"""All planners behind one call, with what each makes small: what a table of them needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from carpool.artefacts.trace import Trace
from carpool.errors import CarpoolError
from carpool.placement.baselines import linear, random, round_robin
from carpool.placement.demand import loads_LE, transitions_JEE
from carpool.placement.eplb import eplb
from carpool.placement.exflow import exflow
from carpool.placement.fanout import fan_out
from carpool.placement.moetuner import moetuner
from carpool.placement.placement import Placement


@dataclass(frozen=True)
class Sizes:
    """What placements are for: `devices` on `nodes`, `redundant` replicas, expert `groups` of the model, `seed`."""

    devices: int
    nodes: int = 1
    redundant: int = 0
    groups: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Planner:
    """One row of a comparison.

    Attributes:
        name: of the row.
        objective: what it makes small, an attribute of `carpool.placement.score.Score`; empty for baselines.
        make: the placement for a trace.
        rule: which replica computes.
        replicas: it takes `Sizes.redundant`.
    """

    name: str
    objective: str
    make: Callable[[Trace, Sizes], Placement]
    rule: str = "hash"
    replicas: bool = False


def _baseline(make: Callable[..., Placement]) -> Callable[[Trace, Sizes], Placement]:
    return lambda trace, sizes: make(trace.num_layers, trace.num_experts, sizes.devices, sizes.nodes)


def _linear(trace: Trace, sizes: Sizes) -> Placement:
    redundant = sizes.redundant if trace.num_experts % sizes.devices else 0
    return linear(trace.num_layers, trace.num_experts, sizes.devices, sizes.nodes, redundant=redundant)


def _random(trace: Trace, sizes: Sizes) -> Placement:
    return random(trace.num_layers, trace.num_experts, sizes.devices, sizes.nodes, seed=sizes.seed)


def _eplb(trace: Trace, sizes: Sizes) -> Placement:
    return eplb(loads_LE(trace), sizes.devices, sizes.nodes, groups=sizes.groups)


def _replicated(trace: Trace, sizes: Sizes) -> Placement:
    return eplb(
        loads_LE(trace), sizes.devices, sizes.nodes, redundant=sizes.redundant or sizes.devices, groups=sizes.groups
    )


def _exflow(trace: Trace, sizes: Sizes) -> Placement:
    return exflow(transitions_JEE(trace, best_only=True), sizes.devices, sizes.nodes, seed=sizes.seed)


def _moetuner(trace: Trace, sizes: Sizes) -> Placement:
    return moetuner(loads_LE(trace), transitions_JEE(trace), sizes.devices, sizes.nodes)


def _fan_out(trace: Trace, sizes: Sizes) -> Placement:
    return fan_out(trace, sizes.devices, sizes.nodes, seed=sizes.seed)


PLANNERS = (
    Planner("linear", "", _linear),
    Planner("round-robin", "", _baseline(round_robin)),
    Planner("random", "", _random),
    Planner("eplb", "peak_tokens", _eplb),
    Planner("eplb + replicas", "peak_tokens", _replicated, replicas=True),
    Planner("eplb + replicas, metro", "peak_activated", _replicated, "metro", replicas=True),
    Planner("fan-out", "fan_out", _fan_out),
    Planner("exflow", "hops", _exflow),
    Planner("moetuner", "hops", _moetuner),
)  # fmt: skip


def possible(num_experts: int, sizes: Sizes, planners: Sequence[Planner] = PLANNERS) -> list[Planner]:
    """Those that can place so many experts: all, or those that fill devices with replicas where experts that lie once
    do not divide among them."""
    uneven = bool(sizes.redundant and num_experts % max(sizes.devices, 1))
    return [one for one in planners if not uneven or one.replicas or one.name == "linear"]


def planner(name: str) -> Planner:
    """Raises CarpoolError for a name that no planner has."""
    found = {one.name: one for one in PLANNERS}
    if name not in found:
        raise CarpoolError(f"no planner is named {name!r}: use one of {', '.join(found)}")
    return found[name]
