"""From a trace to what its requests chose: the sequences that measures and simulations take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from carpool.errors import CarpoolError

if TYPE_CHECKING:
    from carpool.artefacts.trace import Trace


@dataclass(frozen=True, eq=False)
class Requests:
    """What requests chose, each in the order of its positions.

    Attributes:
        experts: of each, int64 `[T, L, K]`, -1 in free slots. weights: the same, if they are known.
        num_experts: `E`.
    """

    experts: list[Tensor]
    weights: list[Tensor] | None
    num_experts: int

    def __len__(self) -> int:
        return len(self.experts)

    def split(self) -> tuple[Requests, Requests]:
        """Every second one, and the others: to fit on, and to score on.

        Raises:
            CarpoolError: there is only one.
        """
        if len(self) < 2:
            raise CarpoolError("what is fitted is scored on other requests: record a trace of two or more")
        return self._part(0), self._part(1)

    def _part(self, first: int) -> Requests:
        weights = None if self.weights is None else self.weights[first::2]
        return Requests(self.experts[first::2], weights, self.num_experts)


def requests_of(trace: Trace, phase: str | None = "decode") -> Requests:
    """The requests of a trace.

    Args:
        phase: only rows of this phase; None takes all, in the order of positions: what a request's tokens chose,
            whether they were read or decoded.
    """
    if phase is not None:
        trace = trace.of_phase(phase)
    experts_TLK, weights_TLK = trace.experts_TLK.long(), trace.weights_TLK
    if weights_TLK is not None:
        experts_TLK = torch.where(weights_TLK == 0, -1, experts_TLK)
    experts, weights = [], []
    for request in trace.request_T.unique().tolist():
        rows_R = (trace.request_T == request).nonzero().flatten()
        rows_R = rows_R[trace.position_T[rows_R].sort(stable=True).indices]
        experts.append(experts_TLK[rows_R])
        if weights_TLK is not None:
            weights.append(weights_TLK[rows_R].float())
    return Requests(experts, None if weights_TLK is None else weights, trace.num_experts)
