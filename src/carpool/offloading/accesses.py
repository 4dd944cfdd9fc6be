"""What a model reads, step by step: the experts that the rows of a step choose together.

Shapes: `S` steps, `L` MoE layers, `E` experts, `B` rows of a step, `T` tokens, `K` experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.offloading.consistency import chosen


@dataclass(frozen=True, eq=False)
class Accesses:
    """The experts of every step and layer.

    Attributes:
        needed_SLE: bool, whether any row of the step chose the expert.
        heaviest_SLE: float32, the largest weight among its rows, over that row's total; 0 where nobody chose it. 1 for
            chosen experts where weights are not known.
        heavier_SLE: float32, of the row where that is least, the share of its weight that heavier experts have
            (HOBBIT's score); infinite where nobody chose it.
        begins_S: whether other requests than in the step before run.
    """

    needed_SLE: Tensor
    heaviest_SLE: Tensor
    heavier_SLE: Tensor
    begins_S: Tensor

    def __len__(self) -> int:
        return len(self.needed_SLE)

    @property
    def mean_union(self) -> float:
        """Distinct experts of a step in a layer, the mean."""
        return float(self.needed_SLE.sum(-1).double().mean())


def lockstep(
    requests: Sequence[Tensor], num_experts: int, batch: int = 1, weights: Sequence[Tensor] | None = None
) -> Accesses:
    """Requests that decode `batch` at a time, in step; where one ends before the others its row is empty.

    Args:
        requests: the experts of each one's tokens, `[T, L, K]`; below 0 is nobody. weights: the same of their weights.

    Raises:
        CarpoolError: fewer requests than a batch.
    """
    if not 1 <= batch <= len(requests):
        raise CarpoolError(f"a batch of {batch}: there are {len(requests)} requests; give 1 to {len(requests)}")
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(requests) - batch + 1, batch):
        rows = requests[start : start + batch]
        mixed = None if weights is None else weights[start : start + batch]
        longest = max(map(len, rows))
        needed = torch.zeros(longest, rows[0].shape[1], num_experts, dtype=torch.bool)
        heaviest, heavier = torch.zeros(needed.shape), torch.full(needed.shape, torch.inf)
        for place, row in enumerate(rows):
            size = len(row)
            needed[:size] |= chosen(row, num_experts)
            share = torch.ones(row.shape) if mixed is None else shares(mixed[place], row >= 0)
            before = torch.zeros(row.shape) if mixed is None else above(share)
            ids = torch.where(row < 0, num_experts, row.long())
            for found, value, how in ((heaviest, share, "amax"), (heavier, before, "amin")):
                wide = torch.nn.functional.pad(found[:size], (0, 1))
                found[:size] = wide.scatter_reduce(-1, ids, value, how)[..., :num_experts]
        begins = torch.zeros(longest, dtype=torch.bool)
        begins[0] = True
        parts.append((needed, heaviest, heavier, begins))
    return Accesses(*(torch.cat(part) for part in zip(*parts, strict=True)))


def shares(weights_XK: Tensor, held_XK: Tensor) -> Tensor:
    """A row's weights over their sum, 0 where nobody is held."""
    weights_XK = torch.where(held_XK, weights_XK.float(), 0.0)
    return weights_XK / weights_XK.sum(-1, keepdim=True).clamp_min(1e-30)


def above(share_XK: Tensor) -> Tensor:
    """The weight of what is heavier in the same row, of two equal ones of the one in the earlier slot, `[..., K]`."""
    order_XK = share_XK.sort(dim=-1, descending=True, stable=True).indices
    sorted_XK = share_XK.gather(-1, order_XK)
    return torch.zeros_like(share_XK).scatter(-1, order_XK, sorted_XK.cumsum(-1) - sorted_XK)
