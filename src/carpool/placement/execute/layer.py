"""A MoE layer's experts where a placement puts them, over ranks.

`N` rows of this rank, `K` experts per token, `E` experts, `D` ranks, `H` hidden size, `S` slots of a rank, `U` units
that are sent. What is decided is decided on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from carpool.errors import CarpoolError
from carpool.placement.execute.traffic import Ranks
from carpool.placement.execute.units import WAYS, there_and_back, units
from carpool.placement.execute.weights import Weights, mixed
from carpool.placement.llep import Spill, least_loaded
from carpool.placement.metro import fewest_activated
from carpool.placement.placement import Placement
from carpool.placement.replicas import device_NK

Balance = Callable[[Tensor, Tensor, int], Spill]  # tokens and homes of experts, ranks


class PlacedExperts(nn.Module):
    """The experts of one layer where a placement puts them; every rank has one, with its own experts as parameters.

    Args:
        weights: of all experts, of which the rank keeps its own.
        placement, layer: where they live, and which of the placement's layers this is.
        dispatch: `deepep`: a row goes once to each rank that has some of its experts; `alltoall`: once for each pair;
            `allgather`: to every rank.
        rule: which replica computes (`carpool.placement.replicas.RULES`).
        balance: LLEP: given the step's tokens of each expert, who computes which of them (see `spill`).
        group: of torch.distributed; None: all ranks. Its backend moves tensors of the device they are on.

    Raises:
        CarpoolError: a placement for another number of ranks or experts; `balance` with replicas.
    """

    def __init__(
        self, weights: Weights, placement: Placement, layer: int = 0, *, dispatch: str = "deepep", rule: str = "hash",
        balance: Balance | None = None, group: object = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.ranks = Ranks(group)
        if placement.devices != self.ranks.count:
            raise CarpoolError(
                f"the placement is for {placement.devices} devices, the group has {self.ranks.count} ranks"
            )
        if len(weights.down) != placement.num_experts:
            raise CarpoolError(
                f"the placement places {placement.num_experts} experts, the layer has {len(weights.down)}"
            )
        if dispatch not in WAYS:
            raise CarpoolError(f"dispatch {dispatch!r}: use one of {', '.join(WAYS)}")
        if balance is not None and bool((placement.replicas_LE[layer] > 1).any()):
            raise CarpoolError("LLEP moves experts that lie once; use a placement without replicas")
        self.dispatch, self.rule, self.balance = dispatch, rule, balance
        self.holds_DE = placement.holds_LDE[layer]
        self.home_E = placement.device_LE[layer]
        self.own_S = placement.expert_LDS[layer, self.ranks.mine].unique()
        mine = weights.some(self.own_S)
        self.gate_up, self.down = nn.Parameter(mine.gate_up.clone()), nn.Parameter(mine.down.clone())
        self.computed_E = torch.zeros(placement.num_experts, dtype=torch.int64)  # pairs by expert, of the last forward

    def forward(self, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, place_N: Tensor | None = None) -> Tensor:
        """The rank's rows through their experts, wherever they are, `[N, H]`. Every rank has to call it.

        Args:
            ids_NK: int64. A pair of weight 0 is not computed.
            place_N: of the rows in the step over all ranks, which `hash` goes by; default: rank after rank.

        Raises:
            CarpoolError: a rank is gone.
        """
        ids, asked_NK = ids_NK.cpu(), (weights_NK != 0).cpu()
        weights, place_E = Weights(self.gate_up, self.down), torch.full_like(self.home_E, -1)
        place_E[self.own_S] = torch.arange(len(self.own_S))
        if self.balance is None:
            device = self._chosen(ids, asked_NK, place_N)
        else:
            device, spilled = self._spilled(ids, asked_NK)
            weights, place_E = self._with_moved(place_E, spilled)
        sent = units(self.dispatch, device, self.ranks.count)

        def compute(hidden_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
            self.computed_E = ids_RK[ids_RK >= 0].bincount(minlength=len(self.home_E)).cpu()
            return mixed(weights, place_E, hidden_RH, ids_RK, weights_RK)

        return there_and_back(self.ranks, sent, hidden_NH, ids_NK, weights_NK, compute)

    def _chosen(self, ids_NK: Tensor, asked_NK: Tensor, place_N: Tensor | None) -> Tensor:
        if self.rule == "metro":
            active_E = torch.zeros_like(self.home_E, dtype=torch.bool)
            active_E[ids_NK[asked_NK]] = True
            all_E = self.ranks.gather("active experts", active_E.to(torch.uint8)).bool().any(0)
            device_E = fewest_activated(all_E.unsqueeze(0), self.holds_DE)[0]
            return torch.where(asked_NK, device_E[ids_NK], -1)
        if place_N is None:
            rows_D = self.ranks.gather("rows of each rank", torch.tensor(len(ids_NK)))
            place_N = int(rows_D[: self.ranks.mine].sum()) + torch.arange(len(ids_NK))
        return device_NK(
            ids_NK, asked_NK, self.holds_DE, torch.zeros(len(ids_NK), dtype=torch.int64), place_N, self.rule
        )

    def _spilled(self, ids_NK: Tensor, asked_NK: Tensor) -> tuple[Tensor, Spill]:
        """The rank that computes each pair: an expert's tokens are numbered rank after rank, row after row."""
        assert self.balance is not None
        tokens_E = ids_NK[asked_NK].bincount(minlength=len(self.home_E))
        tokens_DE = self.ranks.gather("tokens of each expert", tokens_E)
        spilled = self.balance(tokens_DE.sum(0), self.home_E, self.ranks.count)
        before_E = tokens_DE[: self.ranks.mine].sum(0)
        device = torch.full_like(ids_NK, -1)
        for expert, rank, first, end in spilled.segments_X4.tolist():
            row_U, slot_U = ((ids_NK == expert) & asked_NK).nonzero(as_tuple=True)
            place_U = before_E[expert] + torch.arange(len(row_U))
            here_U = (place_U >= first) & (place_U < end)
            device[row_U[here_U], slot_U[here_U]] = rank
        return device, spilled

    def _with_moved(self, place_E: Tensor, spilled: Spill) -> tuple[Weights, Tensor]:
        """The rank's experts and those that are sent to it for this step; their gradients go home."""
        moves = [(expert, int(self.home_E[expert]), rank) for expert, rank in spilled.moves_X2.tolist()]
        out = sorted((rank, expert) for expert, home, rank in moves if home == self.ranks.mine)
        come = sorted((home, expert) for expert, home, rank in moves if rank == self.ranks.mine)
        sent_D = [sum(rank == one for rank, _ in out) for one in range(self.ranks.count)]
        received_D = [sum(home == one for home, _ in come) for one in range(self.ranks.count)]
        which = place_E[torch.tensor([expert for _, expert in out], dtype=torch.int64)]
        held = torch.cat([self.gate_up.flatten(1), self.down.flatten(1)], 1)
        got = self.ranks.exchange("experts", held[which], sent_D, received_D)
        gate_up, down = got.split([self.gate_up[0].numel(), self.down[0].numel()], 1)
        place_E = place_E.clone()
        foreign = torch.tensor([expert for _, expert in come], dtype=torch.int64)
        place_E[foreign] = len(self.own_S) + torch.arange(len(come))
        return Weights(
            torch.cat([self.gate_up, gate_up.view(-1, *self.gate_up.shape[1:])]),
            torch.cat([self.down, down.view(-1, *self.down.shape[1:])]),
        ), place_E


def spill(**settings: float) -> Balance:
    """LLEP's rule with these settings of `carpool.placement.llep.least_loaded`."""
    return lambda tokens_E, home_E, ranks: least_loaded(tokens_E, home_E, ranks, **settings)  # type: ignore[arg-type]
