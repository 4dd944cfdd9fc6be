"""Who the rows of a forward pass are: filled from the engine's batch just before it, read by every router.

The buffers live as long as the engine, so a recorded CUDA graph reads the rows of the step it is replayed in.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carpool.hosts.engine.request_keys import group_key, opted_out
from carpool.routing.batch import Batch

KEYED = ("tenant", "prompt")  # groupings by what requests say of themselves
MAX_VIEWS = 512  # numbers of rows whose views are kept


@dataclass(frozen=True)
class Requests:
    """The requests of one forward pass, in the order of their rows.

    Attributes:
        lengths: rows of each. prefill: whether these are prompt or recomputed rows.
        parameters: the engine's sampling parameters of each, or None.
        votes: whether each row has a say, where it may share; None: all have.
    """

    lengths: NDArray[Any]
    prefill: NDArray[np.bool_]
    parameters: list[Any]
    votes: NDArray[np.bool_] | None = None


class Rows:
    """Request and phase of each row.

    Args:
        size: rows that the buffers hold. max_requests: of a step.
        group: rows that share a coreset.
        isolation: the widest grouping in which requests may depend on each other; None: the group's.
        device: of the model.

    Attributes:
        size: rows the buffers hold.
        expected: rows of the running forward pass, padding included; 0 outside of one. real: without padding.
        sharing: rows of the running forward pass that a policy may change.
    """

    def __init__(
        self, size: int, max_requests: int, group: str, device: torch.device, isolation: str | None = None
    ) -> None:
        self.size, self.max_requests, self.group = size, max_requests, group
        self._isolation = isolation or group
        self.expected = self.real = self.sharing = 0
        # written here and sent at once; on a CPU the tensors are this very memory
        self._numbers_2N = np.zeros((2, size), np.int64)
        self._flags_3N = np.zeros((3, size), np.bool_)
        self._flags_3N[2] = True
        self._padding_3N = torch.tensor(self._flags_3N, device=device)
        self._sent_2N = torch.from_numpy(self._numbers_2N).to(device)
        self._sent_3N = torch.from_numpy(self._flags_3N).to(device)
        self._request_N, self._keyed_N = self._sent_2N
        self._real_N, self._voter_N, self._exempt_N = self._sent_3N
        self._zero_N = torch.zeros(size, dtype=torch.int64, device=device)
        self._slots_R = torch.zeros(max(2, max_requests), dtype=torch.int64, device=device)
        self._views: dict[int, tuple[Tensor, ...]] = {}
        self._parameters: list[Any] = []
        self._out_R = np.zeros(0, bool)
        self._group_R = np.zeros(0, np.int64)
        self._shares = np.zeros(0, dtype=bool)
        self._places_M: Tensor | None = None

    def fill(self, requests: Requests, num_rows: int) -> None:
        """Describe the batch that is about to run in `num_rows` rows, padding included.

        Prompt rows, recomputed rows and requests that opted out are exempt.
        """
        lengths = requests.lengths
        self._read(requests.parameters)
        shares = np.repeat(~requests.prefill & ~self._out_R, lengths)
        count = len(shares)
        self.expected, self.real, self.sharing = num_rows, count, int(shares.sum())
        self._shares, self._places_M = shares, None
        request_N, keyed_N = self._numbers_2N[:, : num_rows + 1]  # a lone row may get one of padding
        request_N[:count], request_N[count:] = np.repeat(np.arange(len(lengths)), lengths), 0
        if self.group in KEYED:
            keyed_N[:count], keyed_N[count:] = np.repeat(self._group_R, lengths), 0
        real_N, voter_N, exempt_N = self._flags_3N
        real_N[:count], real_N[count:] = True, False
        voter_N[:count], voter_N[count:] = shares if requests.votes is None else shares & requests.votes, False
        exempt_N[:count], exempt_N[count:] = ~shares, True
        if self._sent_2N.device.type != "cpu":
            for sent, array in ((self._sent_2N, self._numbers_2N), (self._sent_3N, self._flags_3N)):
                sent.copy_(_sendable(array, sent.device), non_blocking=True)

    def _read(self, parameters: list[Any]) -> None:
        """What requests say of themselves, read once: from step to step they are mostly the same objects."""
        if len(parameters) == len(self._parameters) and all(map(is_, parameters, self._parameters)):
            return
        count = len(parameters)
        self._out_R = np.fromiter(map(opted_out, parameters), bool, count)
        if self.group in KEYED:
            self._group_R = _numbers((group_key(given, self.group, self._isolation) for given in parameters), count)
        self._parameters = parameters

    def regroup(self, group: str) -> None:
        """Let other rows share a coreset, between two forward passes; nothing that was recorded may hold the old."""
        self.group = group
        self._views.clear()
        self._parameters = []

    def clear(self) -> None:
        """No request is running: whatever is forwarded now (profiling, warm-up, graph capture) is padding."""
        self.expected = self.real = self.sharing = 0
        self._sent_3N.copy_(self._padding_3N)

    def batch(self, num_rows: int) -> Batch:
        """The first `num_rows` rows."""
        group_N, real_N, voter_N, exempt_N, step_N, request_N, _ = self.tensors(num_rows)
        num_requests = min(self.max_requests, num_rows)  # a request has a row at least
        num_groups = 1 if self.group == "batch" else num_requests
        return Batch(
            group_N, num_groups, real_N, voter_N, exempt_N, step_N, request_N=request_N, num_requests=num_requests
        )

    @property
    def together(self) -> int:
        """Rows that a policy may change in the group that has most of them."""
        if self.group == "batch":
            return self.sharing
        number_N = self._numbers_2N[int(self.group in KEYED), : self.real]
        return int(np.bincount(number_N[self._shares]).max(initial=0))

    def sharing_rows(self) -> Tensor | None:
        """Places of the rows that a policy may change; None where these are all."""
        if self.sharing == self.expected:
            return None
        if self._places_M is None:
            device = self._zero_N.device
            self._places_M = _sendable(np.flatnonzero(self._shares), device).to(device, non_blocking=True)
        return self._places_M

    def tensors(self, num_rows: int) -> tuple[Tensor, ...]:
        """Group, real, voter, exempt, step and request of the first `num_rows` rows, and a tensor as long as the
        number of requests (two at least), whose length a compiled graph reads. All layers of a step ask for them."""
        if num_rows not in self._views:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            group_N = {"batch": self._zero_N, "request": self._request_N}.get(self.group, self._keyed_N)
            buffers = (group_N, self._real_N, self._voter_N, self._exempt_N, self._zero_N, self._request_N)
            views = {
                id(buffer): buffer[:num_rows] for buffer in buffers
            }  # one view a buffer, also where it is two things
            slots_R = self._slots_R[: max(2, min(self.max_requests, num_rows))]
            self._views[num_rows] = (*(views[id(buffer)] for buffer in buffers), slots_R)
        return self._views[num_rows]

    def example(self) -> None:
        """Rows that a graph can be compiled with: two a request, the last ones exempt."""
        numbers_N = torch.arange(self.size, device=self._zero_N.device)
        self._request_N.copy_((numbers_N // 2).clamp_max(self.max_requests - 1))
        self._keyed_N.copy_(self._request_N // 2)
        self._real_N[:-1] = True
        self._exempt_N.copy_(numbers_N >= self.size - 3)
        self._voter_N.copy_(~self._exempt_N)


def _sendable(array: NDArray[Any], device: torch.device) -> Tensor:
    """On CPUs the same memory, else a copy that the device fetches while the host goes on; torch keeps it meanwhile."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory()


def _numbers(keys: Iterable[Hashable | None], count: int) -> NDArray[np.int64]:
    """Each request's group, the number of the first request with its key; without a key it is alone."""
    first: dict[Hashable, int] = {}
    numbers = (i if key is None else first.setdefault(key, i) for i, key in enumerate(keys))
    return np.fromiter(numbers, np.int64, count)
