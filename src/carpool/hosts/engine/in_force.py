"""What an engine does now: the answer of `carpool_set`, and its log, one line at the start and one a change."""

from __future__ import annotations

from typing import Any, Protocol

from carpool.hosts.engine.fused import path
from carpool.hosts.engine.log import log


class Host(Protocol):
    """What is said of `carpool.hosts.engine.host.Host`."""

    step: Any
    weights: Any
    layers: Any
    settings: Any
    metrics: Any

    @property
    def surrogate_memory(self) -> int: ...


def in_force(host: Host) -> dict[str, Any]:
    """The settings of a loaded model, as plain values."""
    assert host.step is not None
    assert host.weights is not None
    plans = {str(layer.plan) for layer in host.layers}
    statistics = host.weights.policies.statistics
    return {
        "policy": plans.pop() if len(plans) == 1 else "set per layer" if plans else "no layer on this rank",
        "group": str(host.settings.group),
        "isolation": host.settings.isolation,
        "enabled": host.step.enabled,
        "moe_layers": len(host.layers),
        "num_experts": sorted({layer.num_experts for layer in host.layers}),
        "top_k": sorted({layer.spec.top_k for layer in host.layers}),
        "statistics": None if statistics is None else str(statistics),
        "surrogate_memory": host.surrogate_memory,
        "paths": sorted({path(layer) for layer in host.layers}),
        "compiled": all(layer.graph is not None for layer in host.layers),
    }


def line(found: dict[str, Any]) -> str:
    """The same for people, in one line."""
    surrogates = f", surrogates of {found['surrogate_memory'] / 1e6:.1f} MB" if found["surrogate_memory"] else ""
    return (
        f"{'on' if found['enabled'] else 'off (native routing)'}, {found['policy']} in {found['moe_layers']} layers of "
        f"{_all(found['num_experts'])} experts, {_all(found['top_k'])} a token; group {found['group']}, isolation "
        f"{found['isolation']}, statistics {found['statistics'] or 'none'}{surrogates}, "
        f"{' and '.join(found['paths']) or 'no layer'}"
    )


def say(host: Host, what: str) -> None:
    """One line in the engine's log, from one of the ranks that decide alike.

    Args:
        host: with a loaded model.
        what: happened, such as "starts".
    """
    if host.metrics is not None and host.metrics.publishes:
        log().info("carpool %s: %s", what, line(in_force(host)))


def say_refused(host: Host, cause: Exception) -> None:
    """The same of a change that was refused."""
    if host.metrics is not None and host.metrics.publishes:
        log().warning("carpool refuses a change: %s", cause)


def _all(counts: list[int]) -> str:
    return " or ".join(map(str, counts)) or "no"
