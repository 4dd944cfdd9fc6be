"""A model of what a layer's step takes on the busiest device, to say when a placement pays.

It predicts under numbers that its user has measured or entered, and is no measurement itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.placement.dispatch import way


@dataclass(frozen=True)
class CostModel:
    """`max(a + b * experts, c + d * pairs)` of the busiest device, plus what is sent (TEMPO, arXiv 2608.13057).

    Attributes:
        a, b: microseconds of a layer, and of each expert that a device reads. c, d: the same, of each (row, expert)
            pair.
        link: bytes a microsecond that leave a device; 0: sending takes no time.
    """

    a: float
    b: float
    c: float
    d: float
    link: float = 0.0

    def __post_init__(self) -> None:
        if min(self.a, self.b, self.c, self.d, self.link) < 0:
            raise CarpoolError("a cost model has no negative numbers: give a,b,c,d in microseconds, link in bytes each")

    @classmethod
    def parse(cls, text: str) -> CostModel:
        """From `a,b,c,d` or `a,b,c,d,link`; raises CarpoolError for anything else."""
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (4, 5) or not all(abs(one) < float("inf") for one in numbers):
            raise CarpoolError(f"--cost {text!r}: give a,b,c,d (microseconds) and, if you like, bytes a microsecond")
        return cls(*numbers)

    def devices(self, activated: Tensor, pairs: Tensor) -> Tensor:
        """Microseconds of each device, of the shape of both."""
        return torch.maximum(self.a + self.b * activated.double(), self.c + self.d * pairs.double())

    def layer(self, activated_XD: Tensor, pairs_XD: Tensor, sent_bytes: float = 0.0) -> float:
        """Microseconds of a layer, mean over steps; `sent_bytes` leave each device in a step."""
        busiest_X = self.devices(activated_XD, pairs_XD).amax(-1)
        return float(busiest_X.mean()) + (sent_bytes / self.link if self.link else 0.0)

    def bound_by(self, activated: float, pairs: float) -> str:
        """`experts` or `tokens`: which of the two a device with so many waits for."""
        return "experts" if self.a + self.b * activated >= self.c + self.d * pairs else "tokens"


def fit(activated_R: Tensor, pairs_R: Tensor, micros_R: Tensor) -> CostModel:
    """The model that is closest to measured times of one device, least squares on each side of the knee in turn.

    Raises:
        CarpoolError: fewer than four measurements.
    """
    if len(micros_R) < 4:
        raise CarpoolError(f"{len(micros_R)} measurements do not determine a cost model: give at least 4")
    experts_bound = torch.ones(len(micros_R), dtype=torch.bool)
    model = CostModel(*_line(activated_R, micros_R), *_line(pairs_R, micros_R))
    for _ in range(20):
        by_experts = model.a + model.b * activated_R.double()
        by_tokens = model.c + model.d * pairs_R.double()
        side = by_experts >= by_tokens
        if torch.equal(side, experts_bound) or side.sum() < 2 or (~side).sum() < 2:
            break
        experts_bound = side
        model = CostModel(*_line(activated_R[side], micros_R[side]), *_line(pairs_R[~side], micros_R[~side]))
    return model


def _line(x_R: Tensor, y_R: Tensor) -> tuple[float, float]:
    """Least squares with neither part below 0."""
    x_R, y_R = x_R.double(), y_R.double()
    spread = float(((x_R - x_R.mean()) ** 2).sum())
    slope = max(0.0, float(((x_R - x_R.mean()) * (y_R - y_R.mean())).sum()) / spread) if spread else 0.0
    return max(0.0, float(y_R.mean() - slope * x_R.mean())), slope


def usable(objective: str, dispatch: str, top_k: int) -> str:
    """Why a planner's objective cannot pay under a dispatch, in one sentence; empty where it can.

    Args:
        objective: attribute of `carpool.placement.score.Score` that the planner made small.
    """
    if objective in way(dispatch).pays and not (dispatch == "coherent" and top_k > 1):
        return ""
    if objective == "hops":
        if dispatch == "coherent":
            return f"with {top_k} experts a token has no one device to stay on: its outputs are summed at home"
        return f"with {dispatch} a token goes home between layers, so that which expert follows which costs nothing"
    if objective == "fan_out":
        return f"with {dispatch} as much is sent wherever a token's experts are"
    return f"{dispatch} does not pay for {objective}"
