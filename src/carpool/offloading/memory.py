"""The memory that experts are read into: slots in the layout that the kernels read, and pages for as many as fit.

A slot holds one expert and has addresses for all of it; what is read shallow takes as many pages as its planes do. An
expert that leaves a slot leaves its pages for the next one: fresh pages cost as much as reading them from a fast disk.
They go back to the operating system only where the next expert is shallower and another one needs them.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.kernels.experts.activation import Activation
from carpool.kernels.experts.layout import OUTPUTS, Experts, Lines
from carpool.offloading.cache import Scope
from carpool.offloading.geometry import PAGE, Geometry, padded

NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux: addresses alone take no memory
NO_HUGE = 15  # MADV_NOHUGEPAGE: a huge page would hold more than was read
NOWHERE = -1


class Region:
    """One projection of all slots: planes `[S, D, bytes]` and scales `[S, L, O, G, 16]`, without pages yet."""

    def __init__(self, geometry: Geometry, which: int, slots: int) -> None:
        D = geometry.deepest
        # slots begin on a page, and planes do not meet in the same lines of a cache
        self.plane, gap = padded(geometry.plane_bytes[which]), PAGE // math.gcd(D, 8)
        self.stride = self.plane + gap
        self.planes = _addresses(slots * D * self.stride)
        count = slots * D * self.stride
        self.planes_SDB = torch.frombuffer(self.planes, dtype=torch.uint8, count=count).reshape(slots, D, -1)
        shape = (slots, len(geometry.depths), geometry.blocks[which], geometry.groups[which], OUTPUTS)
        self.scale = geometry.scale_bytes[which]
        self.scales = _addresses(math.prod(shape) * 2)
        self.scale_SLOG = torch.frombuffer(self.scales, dtype=torch.float16, count=math.prod(shape)).reshape(shape)
        self.view = memoryview(self.planes)

    def release(self, slot: int, start: int, offers: Collection[int]) -> None:
        """Give the pages of planes from `start` on back, and of the scales of some offered depths."""
        D, L = self.planes_SDB.shape[1], self.scale_SLOG.shape[1]
        _release(self.planes, (slot * D + start) * self.stride, (slot + 1) * D * self.stride)
        for offer in offers:
            _release(self.scales, (slot * L + offer) * self.scale, (slot * L + offer + 1) * self.scale)


def _addresses(size: int) -> mmap.mmap:
    try:
        held = mmap.mmap(-1, padded(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        raise CarpoolError(f"the system gives no addresses for the experts: {error.strerror or error}") from None
    with suppress(OSError):  # a kernel without huge pages
        held.madvise(NO_HUGE)
    return held


def _release(held: mmap.mmap, start: int, stop: int) -> None:
    first, last = padded(start), stop // PAGE * PAGE
    if last > first:
        held.madvise(mmap.MADV_DONTNEED, first, last - first)


@dataclass
class Pool:
    """Slots that some layers share.

    Attributes:
        capacity: bytes of pages at most. used: bytes of what is held. paged: bytes that have pages, held or not.
        planes_S: planes of each slot that have pages. scales_S: depths whose scales have.
        free: slots without an expert, those with pages last.
    """

    geometry: Geometry
    capacity: int
    regions: tuple[Region, Region]
    units_S2: tuple[Tensor, Tensor]
    biases_SR: tuple[Tensor | None, Tensor | None]
    free: list[int]
    planes_S: list[int]
    scales_S: list[set[int]]
    used: int = 0
    paged: int = field(default=0, init=False)

    @classmethod
    def of(cls, geometry: Geometry, capacity: int, layers: int, activation: Activation) -> Pool:
        slots = min(layers * geometry.experts, max(1, capacity // geometry.read(0, geometry.depths[0])))
        regions = Region(geometry, 0, slots), Region(geometry, 1, slots)
        biases = (
            None if bias is None else torch.zeros(slots, bias.shape[-1])
            for bias in (activation.into_bias_ER, activation.out_bias_EH)
        )  # fmt: skip
        into_SR, out_SR = biases
        units = torch.ones(slots), torch.ones(slots)
        free, nothing = list(reversed(range(slots))), [0] * slots
        return cls(geometry, capacity, regions, units, (into_SR, out_SR), free, nothing, [set() for _ in range(slots)])

    def experts(self, activation: Activation) -> Experts:
        """As the kernels take them, by slot; only what is held may be read."""
        lines = [
            Lines(region.planes_SDB, region.scale_SLOG, unit_S, bias_SR)
            for region, unit_S, bias_SR in zip(self.regions, self.units_S2, self.biases_SR, strict=True)
        ]
        geometry = self.geometry
        return Experts(lines[0], lines[1], geometry.depths, geometry.inner, geometry.group, activation)

    def take(self, depth: int) -> int:
        """A slot for an expert of some depth, without pages that are not for it."""
        slot = self.free.pop()
        self.strip(slot, min(self.planes_S[slot], depth), self.scales_S[slot] & {depth})
        return slot

    def back(self, slot: int, depth: int) -> None:
        """See to it that a slot may have pages down to a depth, and all slots together no more than fit."""
        self._count(slot, max(self.planes_S[slot], depth), self.scales_S[slot] | {depth})
        for other in self.free:
            if self.paged <= self.capacity:
                return
            self.strip(other, 0, set())

    def strip(self, slot: int, planes: int, scales: set[int]) -> None:
        """Leave a slot only these pages."""
        if planes < self.planes_S[slot] or scales != self.scales_S[slot]:
            offers = [self.geometry.depths.index(depth) for depth in self.scales_S[slot] - scales]
            for region in self.regions:
                region.release(slot, planes, offers)
            self._count(slot, planes, scales)

    def _count(self, slot: int, planes: int, scales: set[int]) -> None:
        geometry = self.geometry
        more = (planes - self.planes_S[slot]) * geometry.plane
        more += (len(scales) - len(self.scales_S[slot])) * geometry.scale
        self.planes_S[slot], self.scales_S[slot], self.paged = planes, scales, self.paged + more


class Memory:
    """Experts of all layers.

    Attributes:
        geometry: of the file that they come from. capacity: bytes.
        pools: one of each layer, or of all of them. slot_LE: where an expert is, int64, `NOWHERE` if it is not.
    """

    def __init__(
        self, geometry: Geometry, capacity: int, scope: Scope, units_LE2: Tensor, activations: Sequence[Activation]
    ) -> None:
        L, E = len(geometry.layers), geometry.experts
        self.geometry, self.capacity, self._units_LE2 = geometry, capacity, units_LE2
        if scope == "layer":
            self.pools = [Pool.of(geometry, capacity // L, 1, one) for one in activations]
        else:
            self.pools = [Pool.of(geometry, capacity, L, activations[0])] * L
        self.slot_LE = torch.full((L, E), NOWHERE, device="cpu")
        self._charged_LE = [[0] * E for _ in range(L)]
        self._biases = [_biases(one, geometry.inner) for one in activations]

    @property
    def used(self) -> int:
        """Bytes of all that is held."""
        return sum(pool.used for pool in {id(pool): pool for pool in self.pools}.values())

    def charge(self, place: int, expert: int, start: int, stop: int) -> None:
        """Planes that are about to be read: gives the expert a slot if it has none."""
        pool, slot = self.pools[place], int(self.slot_LE[place, expert])
        if slot == NOWHERE:
            slot = pool.take(stop)
            self.slot_LE[place, expert] = slot
            for units_S, unit in zip(pool.units_S2, self._units_LE2[place, expert], strict=True):
                units_S[slot] = unit
            for held_SR, bias_ER in zip(pool.biases_SR, self._biases[place], strict=True):
                if held_SR is not None and bias_ER is not None:
                    held_SR[slot] = bias_ER[expert]
        size = self.geometry.read(start, stop)
        pool.used += size
        self._charged_LE[place][expert] += size
        pool.back(slot, stop)

    def uncharge(self, place: int, expert: int, start: int, stop: int) -> None:
        """They are not read after all."""
        size = self.geometry.read(start, stop)
        self.pools[place].used -= size
        self._charged_LE[place][expert] -= size
        if start == 0:
            self.leave(place, expert)
        else:
            pool, slot = self.pools[place], int(self.slot_LE[place, expert])
            pool.strip(slot, start, pool.scales_S[slot] - {stop})

    def leave(self, place: int, expert: int) -> None:
        """An expert leaves; its slot keeps its pages."""
        pool, slot = self.pools[place], int(self.slot_LE[place, expert])
        pool.used -= self._charged_LE[place][expert]
        self._charged_LE[place][expert] = 0
        self.slot_LE[place, expert] = NOWHERE
        pool.free.append(slot)

    def planes(self, place: int, expert: int, start: int, stop: int) -> list[memoryview]:
        """Where some planes of both projections go."""
        found, slot = [], int(self.slot_LE[place, expert])
        for plane in range(start, stop):
            for region in self.pools[place].regions:
                first = (slot * self.geometry.deepest + plane) * region.stride
                found.append(region.view[first : first + region.plane])
        return found

    def set_scales(self, place: int, expert: int, depth: int, held: Tensor) -> None:
        """Take a depth's scales of both projections, one behind the other in bytes."""
        offer, slot, first = self.geometry.depths.index(depth), int(self.slot_LE[place, expert]), 0
        for region in self.pools[place].regions:
            part = held[first : first + region.scale].view(torch.float16)
            region.scale_SLOG[slot, offer] = part.reshape(region.scale_SLOG.shape[2:])
            first += region.scale


def _biases(activation: Activation, inner: int) -> tuple[Tensor | None, Tensor | None]:
    """Of both projections, in the order in which the kernels read rows."""
    rows, into_ER, out_EH = activation.gate_first(inner), activation.into_bias_ER, activation.out_bias_EH
    if into_ER is not None:
        into_ER = into_ER.float() if rows is None else into_ER.float()[:, rows]
    return into_ER, None if out_EH is None else out_EH.float()
