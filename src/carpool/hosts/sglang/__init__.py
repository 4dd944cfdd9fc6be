"""SGLang as a host: the plugin's entry point (`sglang.srt.plugins`). Everything else is imported when it is needed."""

from __future__ import annotations


def register() -> None:
    """Called by SGLang in every process it starts; see `carpool.hosts.sglang.arm`."""
    from carpool.hosts.sglang.arm import arm

    arm()
