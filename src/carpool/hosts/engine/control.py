"""What can be asked of a running engine: each host says by which way of its engine's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from carpool.errors import CarpoolError
from carpool.hosts.engine.change import change, checked
from carpool.hosts.engine.host import Host
from carpool.hosts.engine.in_force import in_force, say, say_refused


class Control:
    """What is known as `carpool_set` and `carpool_report`."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def set(self, *positional: Any, **given: Any) -> dict[str, Any]:
        """Change the policy of all layers or who shares with whom, or switch sharing off and on, between two steps.

        Args:
            positional: refused: every value has a name.
            given:
                policy: a policy text; the defaults of serving are added. Replaces settings per layer of a policy file.
                file: a policy file on the worker's machine, with its settings per layer and its statistics.
                group: rows that share a coreset, not wider than the isolation of the start.
                enabled: False routes natively (what is cached stays prompts only), True shares again.
                compile: compile a kind of policy or grouping that this engine has not compiled yet; the engine pauses
                    meanwhile. Without it such a policy runs at once, somewhat slower. Other numbers never need it.

        Returns:
            The settings now in force.

        Raises:
            CarpoolError: an unknown name or a wrong type, a text or file that cannot be read, a policy that does not
                fit the model, its isolation or lacks statistics, a file of another model, weights that are not those of
                the files, or, where CUDA graphs were recorded, another kind of policy or grouping. Nothing has changed
                then.
        """
        host = self._host
        try:
            values = checked(positional, given)
            if host.step is None or host.metrics is None:
                raise CarpoolError("carpool_set: the model is not loaded yet")
            policy, file, group = (values.get(name) for name in ("policy", "file", "group"))
            changes = any(value is not None for value in (policy, file, group))
            if host.foreign and (values.get("enabled") or changes):
                raise CarpoolError(f"carpool_set: {host.foreign}")
            if changes:
                change(host, policy, file, group, values.get("compile", False))
        except CarpoolError as error:
            if host.metrics is not None:
                host.metrics.refused()
            say_refused(host, error)
            raise error.with_traceback(None) from None  # engines log it, more than once
        if "enabled" in values:
            host.enable(values["enabled"])
        if values:
            say(host, "changes")
        return in_force(host)

    def report(self, reset: bool = False) -> dict[str, Any]:
        """The settings in force, the steps without anything to share, and the counters of every layer, since the start
        or the last reset."""
        host = self._host
        if host.step is None or host.steps is None:
            raise CarpoolError("carpool_report: the model is not loaded yet")
        layers = [
            {
                **asdict(row),
                "expert_bytes": layer.experts.bytes,
                "surrogate_bytes": layer.surrogate_bytes,
                "bit_bytes": layer.experts.bit_bytes,
            }
            for row, layer in zip(host.step.counters.report(), host.layers, strict=True)
        ]
        steps = dict(host.steps.counts)
        if reset:
            host.count_anew()
        return {**in_force(host), "steps": steps, "layers": layers}
