"""Does the policy run in every layer? The device's own counters say it, beside the batches that asked for it.

Calls that Python counts prove nothing: profiling and prompts make some, a recorded graph makes none, and an engine that
decodes by a kernel of its own still sends prompts through the router.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from carpool.errors import CarpoolError
from carpool.hosts.engine.layer import Layer, Step
from carpool.plans.counters import LayerReport

WAITED = 3  # steps of each kind after which the device is waited for; later ones are checked when metrics are read
NAMED = 3  # layers of a message


class Proof:
    """How often each layer's policy had to run, to be compared with how often it did.

    Args:
        step: with the rows and the counters.
        layers: in the order of the counters.
    """

    def __init__(self, step: Step, layers: list[Layer]) -> None:
        self._step, self._layers = step, layers
        self.begin()

    @property
    def asked(self) -> tuple[int, ...]:
        """Steps since the counters began in which each layer's policy had to run."""
        return tuple(self._asked)

    def begin(self) -> None:
        """The counters were reset."""
        self._asked = [0] * len(self._layers)
        self._waits = {True: WAITED, False: WAITED}

    def stepped(self) -> None:
        """After a forward pass, while its rows are known.

        Raises:
            CarpoolError: see `check`; or surrogates that were never added.
        """
        rows = self._step.rows
        if not rows.sharing:
            return
        due = [self._step.graphs or rows.sharing >= layer.plan.least_voters for layer in self._layers]
        if not any(due):
            return
        self._asked = [asked + is_due for asked, is_due in zip(self._asked, due, strict=True)]
        decoding = rows.sharing == rows.real  # an engine may have another path for batches without prompts
        if not self._waits[decoding]:
            return
        self._waits[decoding] -= 1
        for layer in self._layers:
            layer.require_added()
        self.check(self._step.counters.report(), self.asked)

    def check(self, report: Sequence[LayerReport], asked: Sequence[int]) -> None:
        """Compare a reading of the counters with what had been asked when it was taken.

        Raises:
            CarpoolError: names the layers whose counters stayed behind.
        """
        if not self._behind(report, asked):
            return
        if self._layers[0].device.type != "cpu":  # the reading may have run ahead of another stream
            torch.accelerator.synchronize(self._layers[0].device)
        behind = self._behind(self._step.counters.report(), asked)
        if behind:
            missed = max(asked[layer.position] - calls for layer, calls in behind)
            names = ", ".join(layer.name for layer, _ in behind[:NAMED])
            more = f" and {len(behind) - NAMED} more layers" if len(behind) > NAMED else ""
            raise CarpoolError(
                f"{names}{more}: the engine bypassed the router in {missed} of {max(asked)} steps that should share, "
                "so no policy ran there; turn off what decodes by a kernel of its own, or leave out the key 'carpool'"
            )

    def _behind(self, report: Sequence[LayerReport], asked: Sequence[int]) -> list[tuple[Layer, int]]:
        rows = zip(self._layers, report, asked, strict=True)
        return [(layer, row.calls) for layer, row, steps in rows if row.calls < steps]
