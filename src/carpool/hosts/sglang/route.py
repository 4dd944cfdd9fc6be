"""`POST /carpool_set` in SGLang's own server: what `Engine.collective_rpc("carpool_set", ...)` is in Python.

SGLang has no route that hands text to its schedulers: `/set_internal_state` takes named numbers, of any name. So the
text of a change travels in such a name.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

ROUTE = "/carpool_set"
CHANGE = "carpool_set "  # before the JSON of a change
REFUSED = "refused"  # beside what is in force: the sentence of the last change, if it was refused
COUNTED = ("steps", "layers", REFUSED)  # of a report, and no setting


def add_route() -> None:
    """Let SGLang's server answer it, for whom `/set_internal_state` is there; before it starts."""
    from fastapi.responses import JSONResponse
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.io_struct import SetInternalStateReq
    from sglang.srt.utils.auth import AuthLevel, auth_level

    if any(getattr(route, "path", None) == ROUTE for route in http_server.app.routes):
        return
    one_at_a_time = asyncio.Lock()

    async def carpool_set(given: dict[str, Any]) -> Any:
        manager = http_server._global_state.tokenizer_manager
        async with one_at_a_time:  # the sentence that is asked for after a refusal is that of this change
            changed = await manager.set_internal_state(SetInternalStateReq(server_args={CHANGE + json.dumps(given): 1}))
            [state, *_] = await manager.get_internal_state()
        found = state["carpool"]
        if not all(changed):
            return JSONResponse({"error": found[REFUSED]}, status_code=400)
        return {name: value for name, value in found.items() if name not in COUNTED}

    http_server.app.add_api_route(ROUTE, auth_level(AuthLevel.ADMIN_OPTIONAL)(carpool_set), methods=["POST"])
