"""How many forward passes had nothing to share, and why: what tells "every row was alone" from "not running"."""

from __future__ import annotations

from carpool.hosts.engine.layer import Layer
from carpool.hosts.engine.step_rows import Rows


class Steps:
    """Counts on the host, beside the device's counters of what the policies did.

    Args:
        rows: of the engine.
        layers: of this rank.

    Attributes:
        counts: `passes` with a request while policies were on; of these `passes_exempt`, in which no row may share
            (prompts, requests that opted out), and `passes_alone`, in which no group has the rows that a policy needs.
    """

    def __init__(self, rows: Rows, layers: list[Layer]) -> None:
        self._rows, self._layers = rows, layers
        self.begin()

    def begin(self) -> None:
        """From zero."""
        self.counts = {"passes": 0, "passes_exempt": 0, "passes_alone": 0}

    def stepped(self) -> None:
        """After a forward pass, while its rows are known."""
        rows = self._rows
        if not rows.real:
            return
        self.counts["passes"] += 1
        if not rows.sharing:
            self.counts["passes_exempt"] += 1
        elif rows.together < min((layer.plan.least_voters for layer in self._layers), default=1):
            self.counts["passes_alone"] += 1
