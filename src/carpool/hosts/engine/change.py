"""A change at run time, checked whole before anything is touched: another policy, file or grouping."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.experts.surrogates import NAMES
from carpool.hosts.engine.fitting import load_statistics, prepare
from carpool.hosts.engine.host import Host
from carpool.hosts.engine.layer import Layer
from carpool.hosts.engine.settings import grouping, policy_of
from carpool.plans.policy_file import PolicyFile

TAKES: dict[str, type] = {"policy": str, "file": str, "group": str, "enabled": bool, "compile": bool}
GIVE = {str: "a text", bool: "true or false"}


def checked(positional: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
    """What `carpool_set` was called with, without what is None.

    Raises:
        CarpoolError: values without a name, unknown names, wrong types, or both a policy and a file.
    """
    names = f"it takes {', '.join(TAKES)}, each by its name"
    if positional:
        raise CarpoolError(f"carpool_set: {positional[0]!r} without a name; {names}")
    for name, value in given.items():
        if name not in TAKES:
            raise CarpoolError(f"carpool_set has no {name!r}; {names}")
        if value is not None and type(value) is not TAKES[name]:
            raise CarpoolError(f"carpool_set: {name}={value!r}; give {GIVE[TAKES[name]]}")
    values = {name: value for name, value in given.items() if value is not None}
    if "policy" in values and "file" in values:
        raise CarpoolError("carpool_set: give either policy or file; a policy file says which policy it is for")
    return values


def change(host: Host, policy: str | None, file: str | None, group: str | None, compile_new: bool) -> None:
    """Let another policy, policy file or grouping in, or raise and change nothing.

    Raises:
        CarpoolError: see `carpool.hosts.engine.control.Control.set`.
    """
    assert host.step is not None
    assert host.weights is not None
    settings = host.settings
    if group is not None:
        settings = replace(settings, group=grouping(group))
        if host.step.graphs and settings.group != host.settings.group:
            raise CarpoolError(
                f"CUDA graphs hold the grouping ({host.settings.group}); start with --enforce-eager to change it at "
                "run time"
            )
    policies = PolicyFile.load(file) if file is not None else None if policy is None else PolicyFile(policy_of(policy))
    plans = [
        layer.plan if policies is None else policies.plan_for(layer.index).for_serving() for layer in host.layers
    ]  # the plan of every layer
    for plan in {str(plan): plan for plan in plans}.values():
        host.require_isolated(plan, settings)
    with _described(host, policies if file is not None else None):
        stats = [prepare(layer, plan) for layer, plan in zip(host.layers, plans, strict=True)]
        if settings.group != host.settings.group:
            host.regroup(settings)
        host.use_plans(plans, stats, compile_new, compile_new)


@contextmanager
def _described(host: Host, policies: PolicyFile | None) -> Iterator[None]:
    """Let the layers have the statistics of a policy file, in the block and, unless that raises, from now on."""
    weights = host.weights
    if policies is None or weights is None:
        yield
        return
    host.check_files(policies)
    layers = host.layers
    compared = policies.model or policies.statistics is not None
    found = load_statistics(policies, layers, host.gates() if compared else {})
    kept = [(layer.source, layer.statistics, layer.resident) for layer in layers]
    try:
        for layer in layers if found is not None else ():
            _describe(layer, found, host)
        yield
    except BaseException:
        for layer, (source, statistics, resident) in zip(layers, kept, strict=True):
            layer.source, layer.statistics, layer.resident = source, statistics, resident
        raise
    weights.policies = policies


def _describe(layer: Layer, found: Any, host: Host) -> None:
    statistics: dict[str, Tensor] = found.for_layer(layer.index)
    others = [name for name in NAMES if not _same(layer.statistics.get(name), statistics.get(name))]
    if others and any(name in statistics for name in NAMES):
        if not host.eager:
            raise CarpoolError(
                "surrogates other than those of the start are not in the graphs that this engine recorded or compiled; "
                "start with this file, or with --enforce-eager"
            )
        layer.resident = None
        host.supplement(layer)
    layer.source, layer.statistics = found, statistics


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
