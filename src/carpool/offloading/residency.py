"""Which experts are in memory, which are on their way, and who leaves for them.

Shapes: `L` MoE layers, `E` experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from carpool.kernels.experts.activation import Activation
from carpool.offloading.cache import Scope
from carpool.offloading.memory import Memory
from carpool.offloading.readers import Job, Readers
from carpool.offloading.rules import History, Rule
from carpool.offloading.store import Store

Place = tuple[int, int]  # a layer among those of the file, and an expert


@dataclass
class Totals:
    """What has happened.

    Attributes:
        uses: experts needed, once a layer and step. hits: of them in memory, deep enough. late: of the others, those
            that were being read already.
        waited, computed: seconds that layers waited for experts, and all that they took.
        fetched: experts read ahead of need. useful: of them needed by the layer they were read for.
    """

    uses: int = 0
    hits: int = 0
    late: int = 0
    fetched: int = 0
    useful: int = 0
    waited: float = 0.0
    computed: float = 0.0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.uses if self.uses else 0.0


class Residency:
    """The experts of all layers, in memory and on disk.

    Attributes:
        memory: where experts are. scope: whether every layer has its part of it, or all share it.
        history: what was used. rule: who leaves. totals: what has happened.
        resident_LE: bits of every expert that are in memory, int64.
        pinned: experts that never leave.
        jobs: experts that are being read. fetched: those that were read for the layer that comes next.
    """

    def __init__(
        self,
        store: Store,
        capacity: int,
        scope: Scope,
        rule: Rule,
        activations: Sequence[Activation],
        threads: int,
        pinned: Collection[Place] = (),
    ) -> None:
        self.store, self.geometry, self.rule, self.scope = store, store.geometry, rule, scope
        L, E = len(self.geometry.layers), self.geometry.experts
        self.memory = Memory(self.geometry, capacity, scope, store.units_LE2, activations)
        self.history, self.totals = History(L, E), Totals()
        self.resident_LE = torch.zeros(L, E, dtype=torch.int64, device="cpu")
        self.readers = Readers(store, self.memory, threads)
        self.jobs: dict[Place, Job] = {}
        self.pinned = frozenset(pinned)
        self.fetched: set[Place] = set()

    def collect(self, jobs: Sequence[Job] | None = None) -> None:
        """Take what has been read.

        Raises:
            CarpoolError: something could not be.
        """
        for job in list(self.jobs.values()) if jobs is None else jobs:
            if job.done:
                del self.jobs[job.place, job.expert]
                if job.error is not None:
                    self.leave(job.place, job.expert)
                    raise job.error
                self.resident_LE[job.place, job.expert] = job.stop

    def size(self, place: int, expert: int, stop: int) -> int:
        """Bytes to read so that an expert is `stop` deep."""
        return self.geometry.read(int(self.resident_LE[place, expert]), stop)

    def submit(self, place: int, expert: int, stop: int, urgency: int) -> Job:
        """Begin to read an expert for which there is room."""
        job = Job(place, expert, int(self.resident_LE[place, expert]), stop, urgency)
        self.memory.charge(place, expert, job.start, stop)
        self.jobs[place, expert] = job
        self.readers.submit(job)
        return job

    def cancel(self, job: Job) -> None:
        """Forget a read, unless it has begun."""
        if self.readers.cancel(job):
            del self.jobs[job.place, job.expert]
            self.memory.uncharge(job.place, job.expert, job.start, job.stop)

    def leave(self, place: int, expert: int) -> None:
        """An expert leaves memory."""
        self.memory.leave(place, expert)
        self.resident_LE[place, expert] = 0

    def victims(self, place: int) -> Iterator[Place]:
        """Experts in the memory that a layer uses, the first to leave first; of equals the later one, as in the
        simulator."""
        held_LE = self.resident_LE > 0
        if self.scope == "layer":
            held_LE = torch.zeros_like(held_LE).index_copy_(0, torch.tensor([place]), held_LE[place : place + 1])
        held_X = held_LE.flatten().nonzero().flatten().flip(0)
        rank_X = self.rule.rank(self.history).flatten()[held_X]
        E = self.geometry.experts
        return iter([divmod(one, E) for one in held_X[rank_X.sort(stable=True).indices].tolist()])

    def room(self, place: int, size: int, victims: Iterator[Place], protected: Collection[Place]) -> bool:
        """Let experts leave until so many bytes are free for a layer; False where nothing more may leave."""
        pool = self.memory.pools[place]
        while pool.used + size > pool.capacity:
            victim = next(victims, None)
            if victim is None:
                return False
            if victim not in protected and victim not in self.jobs and victim not in self.pinned:
                self.leave(*victim)
        return True
