"""Who the rows are: groups that share a coreset, voters, rows that keep their native routing.

Shapes: `N` rows, `G` groups, `S` engine steps (1 inside an engine; one a position in lockstep evaluation).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.routing.exact import MAX_ROWS

GroupKind = Literal["batch", "tenant", "prompt", "request", "block", "position"]


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one forward pass.

    Attributes:
        group_N: int64 in `[0, num_groups)`; rows of one group share a coreset.
        num_groups: static.
        real_N: rows that stand for a token; padding, dummy and profiling rows are not real: they keep their
            native routing and what they hold changes nothing.
        voter_N: real rows with a say in their group's coreset (finished sequences have none).
        exempt_N: rows that keep native routing; the experts they read are free for the rest of their group.
        prefill_N: rows of a prompt, for `decode_only`; None if the host exempts them itself or has none.
        step_N: int64 in `[0, num_steps)`, the engine step a row runs in; rows of one step read experts together.
        num_steps: static.
        device_E: int64, the device that holds each expert; None without expert parallelism.
        request_N: int64 in `[0, num_requests)`, the request of each row, for policies that look at requests inside
            a group; None if the host does not say.
        num_requests: static; 0 without `request_N`.
        free_E: experts that cost nothing to read, since they are in fast memory; None: all cost the same.
    """

    group_N: Tensor
    num_groups: int
    real_N: Tensor
    voter_N: Tensor
    exempt_N: Tensor
    step_N: Tensor
    num_steps: int = 1
    prefill_N: Tensor | None = None
    device_E: Tensor | None = None
    request_N: Tensor | None = None
    num_requests: int = 0
    free_E: Tensor | None = None

    @classmethod
    def of(cls, num_rows: int, *, device: torch.device | str = "cpu", **given: Any) -> Batch:
        """A batch of `num_rows` real rows that all vote in one group, but for what is given."""
        if num_rows > MAX_ROWS:
            raise CarpoolError(f"{num_rows} rows in one forward pass; Carpool handles up to {MAX_ROWS}, split the pass")
        yes = torch.ones(num_rows, dtype=torch.bool, device=device)
        zero = torch.zeros(num_rows, dtype=torch.int64, device=device)
        real_N = given.pop("real_N", yes)
        exempt_N = given.pop("exempt_N", ~yes) | ~real_N
        voter_N = given.pop("voter_N", yes) & real_N & ~exempt_N
        group_N, num_groups = given.pop("group_N", zero), given.pop("num_groups", 1)
        step_N = given.pop("step_N", zero)
        if (given.get("request_N") is None) != (given.get("num_requests", 0) == 0):
            raise CarpoolError("a batch takes request_N and num_requests together")
        return cls(group_N, num_groups, real_N, voter_N, exempt_N, step_N, **given)

    def exempting(self, rows_N: Tensor) -> Batch:
        """The same batch with more rows on native routing (and without their vote)."""
        return replace(self, exempt_N=self.exempt_N | rows_N, voter_N=self.voter_N & ~rows_N)

    def dropping(self, rows_N: Tensor) -> Batch:
        """The same batch with rows treated as padding (non-finite logits)."""
        return replace(self.exempting(rows_N), real_N=self.real_N & ~rows_N)

    def take(self, rows_N: Tensor) -> Batch:
        """The batch of some of its rows, a mask `[N]`; groups keep their numbers."""
        of_rows = {field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_N")}
        return replace(self, **{name: rows[rows_N] for name, rows in of_rows.items() if rows is not None})

    def by_request(self) -> tuple[Batch, Tensor]:
        """The same rows grouped by request inside each group, and the group `[R]` that each of the new groups is of
        (`[1]` where there is one). No more groups than rows are made, however many requests a host numbers."""
        assert self.request_N is not None
        if self.num_groups == 1:
            return replace(self, group_N=self.request_N, num_groups=self.num_requests), self.request_N.new_zeros(1)
        sorted_N, place_N = (self.group_N * self.num_requests + self.request_N).sort()
        new_N = (sorted_N[1:] != sorted_N[:-1]).to(torch.int64)
        number_N = torch.zeros_like(self.group_N).scatter(0, place_N[1:], new_N.cumsum(0))
        group_R = torch.zeros_like(self.group_N).scatter(0, number_N, self.group_N)
        return replace(self, group_N=number_N, num_groups=self.group_N.shape[0]), group_R

    def group_sum(self, values_NX: Tensor) -> Tensor:
        """Integer column sums per group, `[G, X]`: exact, hence the same for every order of the rows."""
        return _sum_by(values_NX, self.group_N, self.num_groups)

    def group_any(self, mask_NX: Tensor) -> Tensor:
        """Whether any row of a group has the mask set, `[G, X]`."""
        return _any_by(mask_NX, self.group_N, self.num_groups)

    def group_max(self, values_NX: Tensor) -> Tensor:
        """Largest of non-negative integers over the rows of each group, `[G, X]`; 0 where a group has no row."""
        return _max_by(values_NX, self.group_N, self.num_groups)

    def step_any(self, mask_NX: Tensor) -> Tensor:
        """Whether any row of a step has the mask set, `[S, X]`."""
        return _any_by(mask_NX, self.step_N, self.num_steps)

    def step_max(self, values_NX: Tensor) -> Tensor:
        """The largest of a step's non-negative integers, `[S, X]`."""
        return _max_by(values_NX, self.step_N, self.num_steps)


def _sum_by(values_NX: Tensor, index_N: Tensor, count: int) -> Tensor:
    if count == 1:
        return values_NX.sum(0, keepdim=True)
    zeros = torch.zeros(count, values_NX.shape[1], dtype=values_NX.dtype, device=values_NX.device)
    return zeros.index_add(0, index_N, values_NX)


def _max_by(values_NX: Tensor, index_N: Tensor, count: int) -> Tensor:
    if count == 1 and values_NX.shape[0] > 0:
        return values_NX.amax(0, keepdim=True)
    zeros = torch.zeros(count, values_NX.shape[1], dtype=values_NX.dtype, device=values_NX.device)
    return zeros.scatter_reduce(0, index_N.unsqueeze(-1).expand_as(values_NX), values_NX, "amax")


def _any_by(mask_NX: Tensor, index_N: Tensor, count: int) -> Tensor:
    if count == 1:
        return mask_NX.any(0, keepdim=True)
    return _sum_by(mask_NX.to(torch.int32), index_N, count) > 0


@dataclass(frozen=True)
class Grouping:
    """Which rows share a coreset: an argument of a run, not of a policy.

    `batch`: all rows of a step. `tenant`: those of requests with the same key, in engines whose requests carry one.
    `prompt`: the samples that were asked for together of one prompt, siblings (n > 1, beams, returned sequences); a
    host knows them by who asked, never by equal text, which anybody could send. `request`: the rows of one sequence.
    `block:n`: `n` consecutive positions of one sequence. `position`: rows at the same position, which is what a batch
    is in lockstep evaluation.
    """

    kind: GroupKind
    block: int = 0

    @classmethod
    def parse(cls, text: str | Grouping) -> Grouping:
        """Raises CarpoolError unless the text is a kind of group; `block:n` with n >= 1."""
        if isinstance(text, Grouping):
            return text
        match = re.fullmatch(r"(batch|tenant|prompt|request|position)|block:([1-9][0-9]{0,8})", str(text))
        if not match:
            raise CarpoolError(f"unknown grouping {text!r}; use 'batch', 'prompt', 'request', 'position' or 'block:n'")
        if match[2]:
            return cls("block", int(match[2]))
        return cls(match[1])  # type: ignore[arg-type]  # the pattern lets nothing else through

    def __str__(self) -> str:
        return f"block:{self.block}" if self.kind == "block" else self.kind
