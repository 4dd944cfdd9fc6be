"""The kill switch of plugins."""

from __future__ import annotations

import os

KILL_SWITCH = "CARPOOL_DISABLE"


def switched_off() -> bool:
    """Whether the environment says that plugins touch nothing, whatever a configuration says."""
    return os.environ.get(KILL_SWITCH, "0").strip().lower() not in ("", "0", "false")
