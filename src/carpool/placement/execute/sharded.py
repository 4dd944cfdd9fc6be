"""Experts that are split over ranks instead of placed on them.

`N` rows of this rank, `K` experts per token, `U` units that are sent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from carpool.placement.execute.traffic import Ranks
from carpool.placement.execute.units import there_and_back, units
from carpool.placement.execute.weights import Weights, mixed


class ShardedExperts(nn.Module):
    """MoEShard (arXiv 2503.08467): every rank has a slice of every expert, so that any routing is balanced; every row
    goes to every rank. No placement is more even.

    Args:
        weights: of all experts, of which the rank keeps slices. group: of torch.distributed; None: all ranks.
    """

    def __init__(self, weights: Weights, *, group: object = None) -> None:
        super().__init__()
        self.ranks = Ranks(group)
        mine = weights.shard(self.ranks.mine, self.ranks.count)
        self.gate_up, self.down = nn.Parameter(mine.gate_up.clone()), nn.Parameter(mine.down.clone())

    def forward(self, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """As of `PlacedExperts`."""
        computed_NK = torch.where(weights_NK != 0, 0, -1).cpu()
        row_U, rank_U, _ = units("allgather", computed_NK, self.ranks.count)
        sent = row_U, rank_U, computed_NK[row_U] >= 0
        place_E = torch.arange(len(self.down))

        def compute(hidden_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
            return mixed(Weights(self.gate_up, self.down), place_E, hidden_RH, ids_RK, weights_RK)

        return there_and_back(self.ranks, sent, hidden_NH, ids_NK, weights_NK, compute)
