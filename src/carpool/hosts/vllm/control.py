"""What can be asked of a running engine, by `LLM.collective_rpc` or vLLM's `/collective_rpc` endpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from carpool.errors import CarpoolError
from carpool.hosts.vllm.fused import path
from carpool.hosts.vllm.host import Host
from carpool.hosts.vllm.isolation import require_isolated
from carpool.hosts.vllm.layers import prepare
from carpool.plans.grammar import parse


class Control:
    """The methods `carpool_set` and `carpool_report` of a worker."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def attach(self) -> None:
        """Give the host's worker the methods."""
        self._host.worker.carpool_set, self._host.worker.carpool_report = self.set, self.report

    def set(self, policy: str | None = None, enabled: bool | None = None, compile: bool = False) -> dict[str, Any]:
        """Change the policy of all layers, or switch sharing off and on, between two steps.

        Args:
            policy: a policy text; the defaults of serving are added. Replaces settings per layer of a policy file.
            enabled: False routes natively (what is cached stays prompts only), True shares again.
            compile: compile a kind of policy that this engine has not compiled yet; the engine pauses meanwhile.
                Without it such a policy runs at once, somewhat slower. Other numbers never need it.

        Returns:
            The settings now in force.

        Raises:
            CarpoolError: a text that cannot be read, a policy that does not fit the model, its isolation or lacks
                statistics, weights that are not those of its files, or, where CUDA graphs were recorded, another
                kind of policy. Nothing has changed then.
        """
        host = self._host
        try:
            if enabled is not None and type(enabled) is not bool:
                raise CarpoolError(f"carpool_set: enabled={enabled!r}; give true or false")
            if host.step is None or host.metrics is None:
                raise CarpoolError("carpool_set: the model is not loaded yet")
            if host.foreign and (enabled or policy is not None):
                raise CarpoolError(f"carpool_set: {host.foreign}")
            if policy is not None:
                plan = parse(policy).for_serving()
                require_isolated(plan, host.settings, host.worker.vllm_config)
                stats = [prepare(layer, plan) for layer in host.layers]
                host.use_plans([plan] * len(host.layers), stats, compile is True, compile is True)
        except CarpoolError:
            if host.metrics is not None:
                host.metrics.refused()
            raise
        if enabled is not None:
            host.enable(enabled)
        return self._settings()

    def report(self, reset: bool = False) -> dict[str, Any]:
        """The settings in force and the counters of every layer since the start or the last reset."""
        host = self._host
        if host.step is None or host.metrics is None:
            raise CarpoolError("carpool_report: the model is not loaded yet")
        layers = [
            {**asdict(row), "expert_bytes": layer.expert_bytes, "surrogate_bytes": layer.surrogate_bytes}
            for row, layer in zip(host.step.counters.report(), host.layers, strict=True)
        ]
        if reset:
            host.count_anew()
        return {**self._settings(), "layers": layers}

    def _settings(self) -> dict[str, Any]:
        host = self._host
        plans = {str(layer.plan) for layer in host.layers}
        assert host.step is not None
        return {
            "policy": plans.pop() if len(plans) == 1 else "set per layer" if plans else "no layer on this rank",
            "group": str(host.settings.group),
            "enabled": host.step.enabled,
            "surrogate_memory": host.surrogate_memory,
            "paths": sorted({path(layer) for layer in host.layers}),
            "compiled": all(layer.graph is not None for layer in host.layers),
        }
