"""Exchanges between ranks that gradients flow back through, and what they send, counted where it is sent.

`R` rows, `D` ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from carpool.errors import CarpoolError


@dataclass
class Traffic:
    """What this rank sent to others, by what it was: `rows` and `bytes`. What stays on the rank is not counted."""

    rows: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def count(self, what: str, rows: int, row_bytes: int) -> None:
        self.rows[what] += rows
        self.bytes[what] += rows * row_bytes


@dataclass(frozen=True, eq=False)
class Ranks:
    """The process group, and the traffic of its exchanges.

    The group's own timeout bounds every wait (`init_process_group(timeout=...)`).
    """

    group: Any = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def mine(self) -> int:
        return dist.get_rank(self.group)

    @property
    def _device(self) -> torch.device:
        """Where the group's backend moves tensors."""
        if dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def exchange(self, what: str, rows: Tensor, sent_D: Sequence[int], received_D: Sequence[int]) -> Tensor:
        """Send consecutive rows to the ranks in order, and get theirs in order; gradients go the other way.

        Every rank has to take part, in the backward pass too: rows require gradients on all ranks or on none.

        Args:
            what: it is, for the count. sent_D, received_D: rows to and from each rank.

        Raises:
            CarpoolError: another rank is gone, or did not answer in time.
        """
        return _Exchange.apply(rows, list(sent_D), list(received_D), what, self)

    def counts(self, sent_D: Sequence[int]) -> list[int]:
        """How many rows each rank sends here, given how many go to each."""
        sent = torch.tensor(list(sent_D))
        return self.exchange("counts", sent, [1] * self.count, [1] * self.count).tolist()

    def gather(self, what: str, mine: Tensor) -> Tensor:
        """`[D, ...]`: every rank's tensor of one shape; no gradients."""
        everywhere = mine.unsqueeze(0).repeat(self.count, *[1] * mine.dim())
        return self.exchange(what, everywhere, [1] * self.count, [1] * self.count)

    def _exchanged(self, what: str, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        row, here = rows.shape[1:], rows.device
        self.traffic.count(what, sum(sent) - sent[self.mine], row.numel() * rows.element_size())
        rows = rows.contiguous().to(self._device)
        got = rows.new_empty(sum(received), *row)
        try:
            dist.all_to_all_single(got, rows, received, sent, group=self.group)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise CarpoolError(
                f"rank {self.mine} of {self.count} could not exchange {what}: another rank ended or did not answer in "
                f"time ({reason[:200]}); start all ranks again"
            ) from None
        return got.to(here)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], what: str, ranks: Ranks) -> Tensor:
        ctx.back = (received, sent, f"gradients of {what}", ranks)
        return ranks._exchanged(what, rows, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, what, ranks = ctx.back
        return ranks._exchanged(what, gradients[0], sent, received), None, None, None, None
