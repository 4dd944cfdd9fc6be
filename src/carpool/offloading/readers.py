"""Threads that read experts: what a layer waits for goes first, then what may be needed next, then what is deepened."""

from __future__ import annotations

import heapq
import mmap
import threading
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from carpool.errors import CarpoolError
from carpool.offloading.memory import Memory
from carpool.offloading.store import Store

DEMAND, AHEAD, DEEPEN = range(3)  # urgency


@dataclass(eq=False)
class Job:
    """An expert to be read: planes from `start` to `stop`, and the scales of `stop`.

    Attributes:
        urgency: `DEMAND` before `AHEAD` before `DEEPEN`.
        begun, done, error: what has become of it.
    """

    place: int
    expert: int
    start: int
    stop: int
    urgency: int
    begun: bool = False
    cancelled: bool = False
    done: bool = False
    error: CarpoolError | None = field(default=None, repr=False)


class Readers:
    """The threads; one of them reads one expert at a time.

    Attributes:
        bytes_read: so far, by urgency at the end of the read.
    """

    def __init__(self, store: Store, memory: Memory, threads: int) -> None:
        self._store, self._memory = store, memory
        self._lock = threading.Condition()
        self._queue: list[tuple[int, int, Job]] = []
        self._number, self._open = 0, True
        self.bytes_read = [0, 0, 0]
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        with self._lock:
            self._push(job)
            self._lock.notify_all()

    def hurry(self, job: Job) -> None:
        """A layer waits for it now."""
        with self._lock:
            if job.urgency != DEMAND:
                job.urgency = DEMAND
                if not job.begun:
                    self._push(job)

    def cancel(self, job: Job) -> bool:
        """Take a job back; False if it has begun."""
        with self._lock:
            if job.begun:
                return False
            job.cancelled = True
            return True

    def wait(self, jobs: Collection[Job]) -> list[Job]:
        """Those that are done, at least one."""
        with self._lock:
            while not (found := [job for job in jobs if job.done]):
                self._lock.wait()
            return found

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be read."""
        return not self._queue

    def close(self) -> None:
        """End the threads; what they are reading they finish."""
        with self._lock:
            self._open = False
            self._lock.notify_all()
        for thread in self._threads:
            thread.join()

    def _push(self, job: Job) -> None:
        self._number += 1
        heapq.heappush(self._queue, (job.urgency, self._number, job))

    def _next(self) -> Job | None:
        with self._lock:
            while self._open:
                while self._queue:
                    job = heapq.heappop(self._queue)[2]
                    if not job.begun and not job.cancelled:
                        job.begun = True
                        return job
                self._lock.wait()
        return None

    def _work(self) -> None:
        page = mmap.mmap(-1, self._store.geometry.scale)  # begins on a page, as direct reads ask
        scales, view = torch.frombuffer(page, dtype=torch.uint8), memoryview(page)
        while (job := self._next()) is not None:
            try:
                self._store.read_scales(job.place, job.expert, job.stop, view)
                self._memory.set_scales(job.place, job.expert, job.stop, scales)
                planes = self._memory.planes(job.place, job.expert, job.start, job.stop)
                self._store.read_planes(job.place, job.expert, job.start, planes)
            except CarpoolError as error:
                job.error = error
            except Exception as error:  # a thread must not end while somebody waits for it
                job.error = CarpoolError(f"cannot read {self._store.path}: {error}")
            with self._lock:
                self.bytes_read[job.urgency] += self._store.geometry.read(job.start, job.stop)
                job.done = True
                self._lock.notify_all()
