"""Units of rows: what is sent to which rank, computed there, sent back and added up.

`N` rows of this rank, `K` experts per token, `D` ranks, `H` hidden size, `U` units (a row to a rank; without
deduplication a pair to a rank), `R` units that arrive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from carpool.placement.dispatch import on_ND
from carpool.placement.execute.traffic import Ranks

WAYS = ("allgather", "deepep", "alltoall")


def units(dispatch: str, device: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row and rank of each unit, ordered by rank, then row, and which of the row's pairs it is for, bool `[U, K]`."""
    if dispatch == "alltoall":
        row_U, slot_U = (device >= 0).nonzero(as_tuple=True)
        order_U = device[row_U, slot_U].argsort(stable=True)
        row_U, slot_U = row_U[order_U], slot_U[order_U]
        slots_UK = torch.nn.functional.one_hot(slot_U, device.shape[1]).bool()
        return row_U, device[row_U, slot_U], slots_UK
    on = on_ND(device, ranks) if dispatch == "deepep" else torch.ones(len(device), ranks, dtype=torch.bool)
    rank_U, row_U = on.T.nonzero(as_tuple=True)
    return row_U, rank_U, device[row_U] == rank_U.unsqueeze(1)


def there_and_back(
    ranks: Ranks,
    sent: tuple[Tensor, Tensor, Tensor],
    hidden_NH: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
    compute: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Send units, compute what arrives, send results back and add them up in the order of ranks, `[N, H]`.

    Args:
        sent: of `units`. compute: gives `[R, H]` from hidden states, experts (-1: none) and weights that arrived.
    """
    row_U, rank_U, slots_UK = sent
    sent_D = rank_U.bincount(minlength=ranks.count).tolist()
    received_D = ranks.counts(sent_D)
    row_U, slots_UK = row_U.to(hidden_NH.device), slots_UK.to(hidden_NH.device)
    parts = {
        "rows": hidden_NH[row_U],
        "choices": torch.where(slots_UK, ids_NK[row_U], -1),
        "weights": weights_NK[row_U] * slots_UK,
    }
    hidden_RH, ids_RK, weights_RK = (ranks.exchange(what, one, sent_D, received_D) for what, one in parts.items())
    back_UH = ranks.exchange("results", compute(hidden_RH, ids_RK, weights_RK), received_D, sent_D)
    return torch.zeros_like(hidden_NH).index_add(0, row_U, back_UH)
