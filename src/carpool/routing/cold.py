"""Who has a say while a block is denoised: in TEAM (arXiv 2602.08404) cold positions ride on the others' experts.

Shapes: `R` rows of `L` positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carpool.artefacts.calls import read_calls
from carpool.errors import CarpoolError

NAME = "team_cold"


@dataclass(frozen=True)
class TeamCold:
    """Who chooses experts: all rows but cold ones. `voters` of `generate`, beside `des_seq(k0=K)` for TEAM's rule.

    A masked position is cold if its last prediction was less probable than `confidence`, no token stands within `near`
    positions of it in the block, and it is none of the `surest` predictions. In the first forward of a block nobody is.

    Attributes:
        confidence: tau_h; 0.7 in the authors' code, 0.4 to 0.8 in the paper.
        near: L_h; 3 in the authors' code, which counts up to it (the paper's formula stops one short), 2 to 6 there.
        surest: predictions that are never cold; 2 in the authors' code, which tries them ahead.
    """

    confidence: float = 0.7
    near: int = 3
    surest: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.confidence <= 1:
            raise CarpoolError(f"confidence {self.confidence}: give a probability, 0 to 1")
        for name in ("near", "surest"):
            if getattr(self, name) < 0:
                raise CarpoolError(f"{name} {getattr(self, name)}: give 0 or more")

    @classmethod
    def parse(cls, text: str) -> TeamCold:
        """From a text such as `team_cold(confidence=0.7, near=3)`.

        Raises:
            CarpoolError: anything else.
        """
        try:
            ((name, unnamed, given),) = read_calls(text, "voters")
            if name != NAME or unnamed or not given.keys() <= cls.__annotations__.keys():
                raise ValueError
            if any(type(value) not in (int, float) for value in given.values()):
                raise ValueError
        except (CarpoolError, ValueError):
            raise CarpoolError(f"{text!r} names no voters; write {NAME}(confidence=0.7, near=3, surest=2)") from None
        return cls(**given)

    def __call__(self, block: Any, rows: list[int], tried_RL: Tensor | None = None) -> Tensor:
        """Voters of the next forward over rows of a `carpool.diffusion.Block`, `[R, L]`; see `voters`."""
        return self.voters(block.masked_AL[rows], block.confidence_AL[rows], block.steps_A[rows] == 0, tried_RL)

    def voters(
        self, masked_RL: Tensor, confidence_RL: Tensor, first_R: Tensor, tried_RL: Tensor | None = None
    ) -> Tensor:
        """Voters of the next forward, bool `[R, L]`.

        Args:
            masked_RL: positions without a token.
            confidence_RL: probability of each position's last prediction.
            first_R: rows whose block has had no forward.
            tried_RL: positions at which it tries a guess.
        """
        without_RL = masked_RL if tried_RL is None else masked_RL & ~tried_RL
        position_L = torch.arange(masked_RL.shape[1], device=masked_RL.device)
        apart_LL = (position_L.unsqueeze(1) - position_L).abs()
        near_RL = ((apart_LL <= self.near) & ~without_RL.unsqueeze(1)).any(-1)
        rank_RL = ranks(masked_RL, confidence_RL)
        cold_RL = masked_RL & (confidence_RL < self.confidence) & ~near_RL & (rank_RL >= self.surest)
        return ~cold_RL | first_R.unsqueeze(1)


def ranks(masked_RL: Tensor, confidence_RL: Tensor) -> Tensor:
    """Rank of every masked position by its last prediction, the surest first (ties: the first); the rest after them."""
    order_RL = torch.where(masked_RL, confidence_RL, -2.0).argsort(dim=-1, descending=True, stable=True)
    return order_RL.argsort(dim=-1)
