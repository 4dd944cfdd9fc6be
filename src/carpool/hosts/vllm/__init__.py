"""vLLM as a host: the plugin's entry point (`vllm.general_plugins`). Everything else is imported when it is needed."""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in every process it starts; see `carpool.hosts.vllm.register`."""
    from carpool.hosts.vllm.arm import arm

    arm()
