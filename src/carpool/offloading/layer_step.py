"""One layer of one step, with experts that have to be read: what is there is computed while the rest is read.

Shapes: `N` rows, `K` experts a row, `E` experts, `H` hidden size, `P` pairs of a row and an expert.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.kernels.experts.layout import Experts
from carpool.kernels.experts.operation import read_experts
from carpool.offloading.misses import Misses
from carpool.offloading.readers import AHEAD, DEEPEN, DEMAND, Job
from carpool.offloading.residency import Residency
from carpool.routing.spec import ALL_BITS

Foretell = Callable[[int, Tensor], Sequence[int]]
"""From a layer's place and the input of its experts: the experts that the next layer may need, the likeliest first."""


class LayerStep:
    """One layer of one step.

    Attributes:
        waiting: experts of the layer that are being read, by job. missing: those that have yet to be.
        computed: those whose outputs are there and that may leave.
    """

    def __init__(self, residency: Residency, misses: Misses, experts: Experts, place: int) -> None:
        self.residency, self.misses, self.experts, self.place = residency, misses, experts, place
        self.totals, self.deepest = residency.totals, residency.geometry.deepest
        self.waiting: dict[Job, int] = {}
        self.missing: deque[int] = deque()
        self.computed: list[int] = []

    def run(
        self,
        hidden_NH: Tensor,
        ids_NK: Tensor,
        weights_NK: Tensor,
        depth_NK: Tensor,
        foretell: Foretell | None,
        deepen: bool,
    ) -> Tensor:
        """The layer's output; see `Offloaded.read`."""
        residency = self.residency
        residency.collect()
        self.hidden_NH, self.ids_NK = hidden_NH.float(), ids_NK.long()
        self._want(weights_NK.float(), depth_NK.long())
        ready = self._sort_out()
        self._victims = residency.victims(self.place) if self.missing or deepen else iter(())
        self._submit()
        if foretell is not None and not self.missing and self.place + 1 < residency.history.layers:
            self._fetch_ahead([int(one) for one in foretell(self.place, self.hidden_NH)])
        if not self.missing and not self.waiting:
            result_NH = self._whole()
        else:
            self.made_NKH = self.hidden_NH.new_zeros(*self.ids_NK.shape, self.hidden_NH.shape[-1])
            self._compute(ready)
            while self.missing or self.waiting:
                if self.waiting:
                    self._receive()
                else:
                    self._make_way()
                self._submit()
            result_NH = self._sum()
        if deepen and residency.readers.idle:
            self._deepen_one()
        return result_NH

    def _want(self, weights_NK: Tensor, depth_NK: Tensor) -> None:
        """How deep each expert is wanted, `wanted_E`; pairs that nobody wants lose their weight."""
        residency, geometry = self.residency, self.residency.geometry
        offered = depth_NK.new_tensor([0, *(geometry.offered(bits) for bits in range(1, ALL_BITS + 1))])
        most_NK = offered[depth_NK]
        self.weights_NK = torch.where(most_NK == 0, 0.0, weights_NK)
        held_NK = residency.resident_LE[self.place][self.ids_NK]
        wanted_NK = self.misses.wanted(self.weights_NK, held_NK, most_NK)
        self.wanted_E = depth_NK.new_zeros(geometry.experts)
        self.wanted_E.scatter_reduce_(0, self.ids_NK.flatten(), wanted_NK.flatten(), "amax")
        self._leave_out()
        self.needed = self.wanted_E.nonzero().flatten().tolist()
        self.protected = {(self.place, expert) for expert in self.needed}
        history = residency.history
        step = history.step + (self.place <= history.layer or history.step < 0)
        history.observe(step, self.place, self.wanted_E > 0, self.wanted_E == self.deepest)

    def _leave_out(self) -> None:
        """Pairs whose expert nobody reads lose their weight to the others of their row."""
        left_NK = torch.where(self.wanted_E[self.ids_NK] == 0, 0.0, self.weights_NK)
        if not torch.equal(left_NK, self.weights_NK):
            whole_N1, left_N1 = (one.sum(-1, keepdim=True) for one in (self.weights_NK, left_NK))
            self.weights_NK = torch.where(whole_N1 == left_N1, self.weights_NK, left_NK * whole_N1 / left_N1)

    def _sort_out(self) -> list[int]:
        """Finds what has to be read and what is being read; returns the experts that are there."""
        residency, place, totals = self.residency, self.place, self.totals
        held, wanted = residency.resident_LE[place].tolist(), self.wanted_E.tolist()
        totals.useful += sum(wanted[expert] > 0 for of, expert in residency.fetched if of == place)
        residency.fetched.clear()
        for job in [job for job in residency.jobs.values() if job.place == place]:
            if not wanted[job.expert]:
                residency.cancel(job)
            elif held[job.expert] < wanted[job.expert]:
                residency.readers.hurry(job)
                self.waiting[job] = job.expert
        taken = set(self.waiting.values())
        ready = [expert for expert in self.needed if held[expert] >= wanted[expert]]
        self.missing.extend(expert for expert in self.needed if held[expert] < wanted[expert] and expert not in taken)
        totals.uses, totals.hits, totals.late = (
            totals.uses + len(self.needed), totals.hits + len(ready), totals.late + len(taken)
        )  # fmt: skip
        return ready

    def _room(self, size: int) -> bool:
        return self.residency.room(self.place, size, self._victims, self.protected)

    def _submit(self) -> None:
        """Begin to read as many of the missing as there is room for."""
        while self.missing:
            expert = self.missing[0]
            stop = int(self.wanted_E[expert])
            if not self._room(self.residency.size(self.place, expert, stop)):
                return
            self.missing.popleft()
            self.waiting[self.residency.submit(self.place, expert, stop, DEMAND)] = expert

    def _receive(self) -> None:
        """Wait for what is being read, and compute it."""
        residency = self.residency
        begun = time.perf_counter()
        done = residency.readers.wait(list(self.waiting))
        self.totals.waited += time.perf_counter() - begun
        residency.collect(done)
        experts = [self.waiting.pop(job) for job in done]
        again = [one for one in experts if residency.resident_LE[self.place, one] < self.wanted_E[one]]
        self.missing.extend(again)  # what was being read was not deep enough
        self._compute([one for one in experts if one not in again])

    def _make_way(self) -> None:
        """Room for one more: an expert of this layer that was computed leaves, or a read for later ends."""
        residency = self.residency
        if self.computed:
            residency.leave(self.place, self.computed.pop())
        elif residency.jobs:
            residency.collect(residency.readers.wait(list(residency.jobs.values())))
            self._victims = residency.victims(self.place)
        else:
            raise CarpoolError("memory does not hold what one layer reads at once; give more")

    def _fetch_ahead(self, expected: Sequence[int]) -> None:
        """Read what the next layer may need, where that lets nothing leave that either layer needs."""
        residency, coming = self.residency, self.place + 1
        self.protected |= {(coming, one) for one in expected}
        stop, victims = self.misses.shallowest or self.deepest, residency.victims(coming)
        for expert in expected:
            if residency.resident_LE[coming, expert] == 0 and (coming, expert) not in residency.jobs:
                if not residency.room(coming, residency.size(coming, expert, stop), victims, self.protected):
                    return
                residency.submit(coming, expert, stop, AHEAD)
                residency.fetched.add((coming, expert))
                self.totals.fetched += 1

    def _deepen_one(self) -> None:
        """While nothing else is to be read: all planes of the shallow expert that was used most."""
        residency, place = self.residency, self.place
        held_E, uses_E = residency.resident_LE[place], residency.history.uses_LE[place]
        some = [one for one in self.needed if 0 < held_E[one] < self.deepest and (place, one) not in residency.jobs]
        if some:
            expert = max(some, key=lambda one: int(uses_E[one]))
            if self._room(residency.size(place, expert, self.deepest)):
                residency.submit(place, expert, self.deepest, DEEPEN)

    def _whole(self) -> Tensor:
        """All experts are there: one call."""
        depth_NK = self.residency.resident_LE[self.place][self.ids_NK]
        return read_experts(self.hidden_NH, self._slots(self.ids_NK), self.weights_NK, depth_NK, self.experts)

    def _slots(self, ids: Tensor) -> Tensor:
        return self.residency.memory.slot_LE[self.place][ids]

    def _compute(self, experts: Sequence[int]) -> None:
        """The outputs of some experts, each pair's by itself."""
        if not experts:
            return
        self.computed += [one for one in experts if (self.place, one) not in self.residency.pinned]
        now_E = torch.zeros_like(self.wanted_E, dtype=torch.bool)
        now_E[list(experts)] = True
        row_P, slot_P = (now_E[self.ids_NK] & (self.weights_NK != 0)).nonzero(as_tuple=True)
        ids_P1 = self.ids_NK[row_P, slot_P].unsqueeze(-1)
        depth_P1 = self.residency.resident_LE[self.place][ids_P1]
        whole_P1 = torch.ones_like(ids_P1, dtype=torch.float32)
        self.made_NKH[row_P, slot_P] = read_experts(
            self.hidden_NH[row_P], self._slots(ids_P1), whole_P1, depth_P1, self.experts
        )

    def _sum(self) -> Tensor:
        """As the kernels do it: in the order of a row's slots."""
        total_NH = torch.zeros_like(self.hidden_NH)
        for slot in range(self.ids_NK.shape[1]):
            weight_N1 = self.weights_NK[:, slot, None]
            total_NH = torch.where(weight_N1 != 0, total_NH + weight_N1 * self.made_NKH[:, slot], total_NH)
        return total_NH
