"""What can be asked of a running SGLang.

`Engine.collective_rpc("carpool_set", policy=...)` changes everything, `POST /set_internal_state` with
`{"server_args": {"carpool_enabled": 0}}` switches (it takes numbers only), and what is in force and was counted stands
under `carpool` in the `internal_states` of `GET /server_info`.
"""

from __future__ import annotations

from typing import Any

from carpool.errors import CarpoolError
from carpool.hosts.engine.control import Control
from carpool.hosts.sglang.host import Host

SWITCH = "carpool_enabled"


def attach(scheduler: Any, host: Host) -> None:
    """Give a scheduler the methods.

    Raises:
        CarpoolError: its prefix cache would share what a policy computed.
    """
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    kind = type(scheduler.tree_cache)
    if kind.checkpoint is not UnifiedRadixCache.checkpoint:
        raise CarpoolError(
            f"{kind.__name__} is not followed, so generated tokens cannot be kept out of it; leave out "
            "--radix-cache-backend"
        )
    control, internal, idle = Control(host), scheduler.internal_state, scheduler.on_idle
    read, write = internal.get_internal_state, internal.set_internal_state

    def state(*args: Any, **kwargs: Any) -> Any:
        found = read(*args, **kwargs)
        found.internal_state["carpool"] = control.report()
        return found

    def change(given: Any) -> Any:
        if SWITCH not in given.server_args:
            return write(given)
        from sglang.srt.managers.io_struct import SetInternalStateReqOutput

        try:
            control.set(enabled=bool(given.server_args[SWITCH]))
        except CarpoolError:  # logged, and counted
            return SetInternalStateReqOutput(updated=False)
        return SetInternalStateReqOutput(updated=True)

    def rested(*args: Any, **kwargs: Any) -> Any:
        host.publish_all()
        return idle(*args, **kwargs)

    internal.get_internal_state, internal.set_internal_state = state, change
    scheduler.carpool_set, scheduler.carpool_report = control.set, control.report
    scheduler.on_idle = rested
