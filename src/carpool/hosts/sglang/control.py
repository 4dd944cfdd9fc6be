"""What can be asked of a running SGLang.

`Engine.collective_rpc("carpool_set", policy=...)` and, over HTTP, `POST /carpool_set` change it; what is in force and
was counted stands under `carpool` in the `internal_states` of `GET /server_info`.
"""

from __future__ import annotations

import json
from typing import Any

from carpool.errors import CarpoolError
from carpool.hosts.engine.control import Control
from carpool.hosts.sglang.host import Host
from carpool.hosts.sglang.route import CHANGE, REFUSED


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
    refused: list[str] = []  # the sentence of the last change over HTTP, if it was refused

    def state(*args: Any, **kwargs: Any) -> Any:
        found = read(*args, **kwargs)
        found.internal_state["carpool"] = control.report() | {REFUSED: refused[0] if refused else None}
        return found

    def change(given: Any) -> Any:
        text = next((name.removeprefix(CHANGE) for name in given.server_args if name.startswith(CHANGE)), None)
        if text is None:
            return write(given)
        from sglang.srt.managers.io_struct import SetInternalStateReqOutput

        refused.clear()
        try:
            control.set(**json.loads(text))
        except (ValueError, TypeError) as error:  # a CarpoolError, logged and counted, or no JSON of an object
            refused.append(str(error))
        return SetInternalStateReqOutput(updated=not refused)

    def rested(*args: Any, **kwargs: Any) -> Any:
        host.publish_all()
        return idle(*args, **kwargs)

    internal.get_internal_state, internal.set_internal_state = state, change
    scheduler.carpool_set, scheduler.carpool_report = control.set, control.report
    scheduler.on_idle = rested
