"""A model's experts on disk, some of them in memory: what a layer needs is read, what nobody needs leaves.

Shapes: `N` rows, `K` experts a row, `E` experts, `H` hidden size.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence

from torch import Tensor

from carpool.errors import CarpoolError
from carpool.kernels.experts.activation import Activation
from carpool.offloading.cache import Scope
from carpool.offloading.layer_step import Foretell, LayerStep
from carpool.offloading.memory import Memory
from carpool.offloading.misses import Misses
from carpool.offloading.readers import DEMAND
from carpool.offloading.residency import Place, Residency, Totals
from carpool.offloading.rules import Rule
from carpool.offloading.store import Store


class Offloaded:
    """The experts of all layers; `read` computes one layer's. One forward runs at a time, others wait."""

    def __init__(
        self,
        store: Store,
        capacity: int,
        rule: Rule,
        misses: Misses,
        activations: Sequence[Activation],
        *,
        scope: Scope = "layer",
        threads: int = 4,
        foretell: Foretell | None = None,
        deepen: bool = False,
        pinned: Collection[Place] = (),
    ) -> None:
        """Args:
            pinned: experts that are read now, whole, and never leave.

        Raises:
            CarpoolError: memory that does not hold one expert beside those that are pinned, experts or depths that are
                not there.
        """
        self._lock, self._closed, geometry = threading.Lock(), False, store.geometry
        misses.check(geometry.depths)
        self._residency = Residency(store, capacity, scope, rule, activations, threads, pinned)
        least, each = geometry.read(0, geometry.deepest), self.memory.pools[0].capacity
        if each < least:
            self.close()
            raise CarpoolError(f"memory of {each} bytes a {scope} holds no expert, which takes {least}; give more")
        self._experts = [pool.experts(one) for pool, one in zip(self.memory.pools, activations, strict=True)]
        self._misses, self._foretell, self._deepen = misses, foretell, deepen
        self._pin(sorted(self._residency.pinned))

    def _pin(self, pinned: Sequence[Place]) -> None:
        geometry, residency = self.store.geometry, self._residency
        least = geometry.read(0, geometry.deepest)
        for place, expert in pinned:
            pool = self.memory.pools[place] if 0 <= place < len(self.memory.pools) else None
            if pool is None or not 0 <= expert < geometry.experts:
                self.close()
                raise CarpoolError(f"pinned: there is no expert {expert} of the {place}th layer with experts")
            if pool.used + 2 * least > pool.capacity:
                self.close()
                raise CarpoolError("memory holds nothing but the experts that are pinned; give more, or pin fewer")
            residency.submit(place, expert, geometry.deepest, DEMAND)
        self.settle()

    @property
    def store(self) -> Store:
        return self._residency.store

    @property
    def memory(self) -> Memory:
        return self._residency.memory

    @property
    def totals(self) -> Totals:
        """What has happened."""
        return self._residency.totals

    @property
    def resident_LE(self) -> Tensor:
        """Bits of every expert that are in memory, int64."""
        return self._residency.resident_LE

    @property
    def bytes_read(self) -> int:
        """Of experts, all threads together."""
        return sum(self._residency.readers.bytes_read)

    @property
    def reading_seconds(self) -> float:
        """In which experts were asked for that were not there yet."""
        return self._residency.readers.seconds

    def begin(self) -> None:
        """Other requests run from here on."""
        with self._lock:
            self._residency.history.begin()

    def settle(self) -> None:
        """Wait for all that is being read."""
        with self._lock:
            while jobs := list(self._residency.jobs.values()):
                self._residency.collect(self._residency.readers.wait(jobs))

    def close(self) -> None:
        """End the reading threads and close the file."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._residency.readers.close()
                self.store.close()

    def read(self, place: int, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, depth_NK: Tensor) -> Tensor:
        """The weighted sum of a layer's experts' outputs, float32 `[N, H]`: bit for bit what they give where all are
        resident, if misses are exact and all is read as deep as it is stored. An expert is computed as deep as it is
        held.

        Args:
            place: of the layer. depth_NK: bits to read of a pair if its expert is not there; `ALL_BITS` for all.

        Raises:
            CarpoolError: the block was left, or the file can no longer be read.
        """
        with self._lock:
            if self._closed:
                raise CarpoolError("these experts are on disk; open them: with carpool.offload(model, memory=...)")
            begun = time.perf_counter()
            step = LayerStep(self._residency, self._misses, self._experts[place], place)
            try:
                return step.run(hidden_NH, ids_NK, weights_NK, depth_NK, self._foretell, self._deepen)
            finally:
                self.totals.computed += time.perf_counter() - begun
