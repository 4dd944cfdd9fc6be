"""Who the rows of a forward over one block of every sequence are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.hosts.transformers.forward_rows import groups_of
from carpool.routing.batch import Batch, Grouping


def block_rows(
    grouping: Grouping,
    request_R: Tensor,
    requests: int,
    position_RL: Tensor,
    *,
    exempt: bool = False,
    voter_RL: Tensor | None = None,
    real_RL: Tensor | None = None,
) -> Batch:
    """The batch of a forward over `R` rows of `L` positions, flattened row by row.

    Args:
        request_R: request of each row, below `requests`; several rows of one request (branches) share its group.
        position_RL: positions in the sequence, for `block:n`.
        exempt: every row keeps its native routing and has no vote (prompts, and blocks that are written to the cache).
        voter_RL: rows with a say in the coreset; default: all.
        real_RL: rows that stand for a token; default: all.

    Raises:
        CarpoolError: grouping by position, which stands for decoding one position at a time.
    """
    if grouping.kind == "position":
        raise CarpoolError("a block decodes its positions in parallel; group by request, batch or block:n")
    R, L = position_RL.shape
    request_N = request_R.repeat_interleave(L)
    given: dict[str, Any] = groups_of(grouping, request_N, requests, position_RL.flatten(), L)
    exempt_N = torch.full_like(request_N, exempt, dtype=torch.bool)
    for name, rows_RL in (("voter_N", voter_RL), ("real_N", real_RL)):
        if rows_RL is not None:
            given[name] = rows_RL.flatten()
    return Batch.of(
        R * L, device=request_N.device, exempt_N=exempt_N, prefill_N=exempt_N, request_N=request_N,
        num_requests=requests, **given,
    )  # fmt: skip
