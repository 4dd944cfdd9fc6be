"""Threads that read experts: what a layer waits for goes first, then what may be needed next, then what is deepened."""

from __future__ import annotations

import heapq
import mmap
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.offloading.memory import Memory
from carpool.offloading.store import Store

DEMAND, AHEAD, DEEPEN = range(3)  # urgency


@dataclass(eq=False)
class Job:
    """An expert to be read: planes from `start` to `stop`, and the scales of `stop`.

    Attributes:
        urgency: `DEMAND` before `AHEAD` before `DEEPEN`.
        taken: pieces that a thread has. cancelled, done, error: what has become of it.
        pieces: that threads read beside each other, in number. left: of them, not there yet.
    """

    place: int
    expert: int
    start: int
    stop: int
    urgency: int
    taken: set[int] = field(default_factory=set)
    cancelled: bool = False
    done: bool = False
    pieces: int = 1
    left: int = 1
    error: CarpoolError | None = field(default=None, repr=False)


class Readers:
    """The threads; an expert is read by two of them where others would have nothing to do.

    Attributes:
        bytes_read: so far, by urgency at the end of the read. seconds: in which anything was asked for and not there.
    """

    def __init__(self, store: Store, memory: Memory, threads: int) -> None:
        self._store, self._memory = store, memory
        self._lock = threading.Condition()
        self._queue: list[tuple[int, int, Job, int]] = []
        self._number, self._open = 0, True
        self.bytes_read, self.seconds, self._asked, self._since = [0, 0, 0], 0.0, 0, 0.0
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        with self._lock:
            if self._asked < len(self._threads) and job.stop - job.start > 1:
                job.pieces = job.left = 2
            self._push(job)
            self._count(1)
            self._lock.notify_all()

    def hurry(self, job: Job) -> None:
        """A layer waits for it now."""
        with self._lock:
            if job.urgency != DEMAND:
                job.urgency = DEMAND
                self._push(job)
                self._lock.notify_all()

    def cancel(self, job: Job) -> bool:
        """Take a job back; False if it has begun."""
        with self._lock:
            if job.taken:
                return False
            job.cancelled = True
            self._count(-1)
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

    def _count(self, more: int) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since if self._asked else 0.0
        self._asked, self._since = self._asked + more, now

    def _push(self, job: Job) -> None:
        for piece in range(job.pieces):
            self._number += 1
            heapq.heappush(self._queue, (job.urgency, self._number, job, piece))

    def _next(self) -> tuple[Job, int] | None:
        with self._lock:
            while self._open:
                while self._queue:
                    _, _, job, piece = heapq.heappop(self._queue)
                    if piece not in job.taken and not job.cancelled:
                        job.taken.add(piece)
                        return job, piece
                self._lock.wait()
        return None

    def _work(self) -> None:
        page = mmap.mmap(-1, self._store.geometry.scale)  # begins on a page, as direct reads ask
        scales, view = torch.frombuffer(page, dtype=torch.uint8), memoryview(page)
        while (found := self._next()) is not None:
            job, piece = found
            try:
                self._read(job, piece, scales, view)
            except CarpoolError as error:
                job.error = error
            except Exception as error:  # a thread must not end while somebody waits for it
                job.error = CarpoolError(f"cannot read {self._store.path}: {error}")
            with self._lock:
                job.left -= 1
                if job.left == 0:
                    self.bytes_read[job.urgency] += self._store.geometry.read(job.start, job.stop)
                    job.done = True
                    self._count(-1)
                    self._lock.notify_all()

    def _read(self, job: Job, piece: int, scales: Tensor, view: memoryview) -> None:
        """One of a job's pieces; the first has the scales."""
        planes = job.stop - job.start
        start, stop = (job.start + planes * one // job.pieces for one in (piece, piece + 1))
        into = self._memory.planes(job.place, job.expert, start, stop)
        self._store.read(job.place, job.expert, job.stop, None if piece else view, start, into)
        if piece == 0:
            self._memory.set_scales(job.place, job.expert, job.stop, scales)
