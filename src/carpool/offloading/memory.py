"""The memory that experts are read into: addresses for all of them, pages for as many as fit.

Every expert has its place, in the layout that the kernels read; a place without pages takes none. What leaves gives its
pages back to the operating system, so that an expert that was read shallow takes as much as its planes do.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

from carpool.errors import CarpoolError
from carpool.kernels.experts.activation import Activation
from carpool.kernels.experts.layout import OUTPUTS, Experts, Lines
from carpool.offloading.geometry import PAGE, Geometry, padded

NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux: addresses alone take no memory
NO_HUGE = 15  # MADV_NOHUGEPAGE: a huge page would hold more than was read


class Region:
    """One projection of a layer's experts: planes `[E, D, bytes]` and scales `[E, L, O, G, 16]`, without pages yet."""

    def __init__(self, geometry: Geometry, which: int) -> None:
        E, D = geometry.experts, geometry.deepest
        # experts begin on a page, and planes do not meet in the same lines of a cache
        self.plane, gap = padded(geometry.plane_bytes[which]), PAGE // math.gcd(D, 8)
        self.stride = self.plane + gap
        self.planes = _addresses(E * D * self.stride)
        self.planes_EDB = torch.frombuffer(self.planes, dtype=torch.uint8, count=E * D * self.stride).reshape(E, D, -1)
        shape = (E, len(geometry.depths), geometry.blocks[which], geometry.groups[which], OUTPUTS)
        self.scale = geometry.scale_bytes[which]
        self.scales = _addresses(math.prod(shape) * 2)
        self.scale_ELOG = torch.frombuffer(self.scales, dtype=torch.float16, count=math.prod(shape)).reshape(shape)
        self.view = memoryview(self.planes)

    def release(self, expert: int) -> None:
        """Give an expert's pages back."""
        experts = len(self.planes_EDB)
        for held, size in ((self.planes, self.planes_EDB.numel()), (self.scales, 2 * self.scale_ELOG.numel())):
            each = size // experts
            first, last = padded(expert * each), (expert + 1) * each // PAGE * PAGE
            if last > first:
                held.madvise(mmap.MADV_DONTNEED, first, last - first)


def _addresses(size: int) -> mmap.mmap:
    try:
        held = mmap.mmap(-1, padded(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        raise CarpoolError(f"the system gives no addresses for the experts: {error.strerror or error}") from None
    with suppress(OSError):  # a kernel without huge pages
        held.madvise(NO_HUGE)
    return held


class Memory:
    """Experts of all layers.

    Attributes:
        geometry: of the file that they come from. capacity, used: bytes. used_L: the same of each layer.
        regions: of each layer, both projections.
    """

    def __init__(self, geometry: Geometry, capacity: int) -> None:
        self.geometry, self.capacity, self.used_L = geometry, capacity, [0] * len(geometry.layers)
        self.regions = [(Region(geometry, 0), Region(geometry, 1)) for _ in geometry.layers]
        self._charged_LE = [[0] * geometry.experts for _ in geometry.layers]

    def experts(self, place: int, units_E2: Tensor, activation: Activation) -> Experts:
        """A layer's, as the kernels take them; only those that are held may be read."""
        geometry = self.geometry
        into, out = self.regions[place]
        units = units_E2.unbind(-1)
        rows, bias_ER = activation.gate_first(geometry.inner), activation.into_bias_ER
        if bias_ER is not None:
            bias_ER = (bias_ER.float() if rows is None else bias_ER.float()[:, rows]).contiguous()
        bias_EH = None if activation.out_bias_EH is None else activation.out_bias_EH.float().contiguous()
        return Experts(
            Lines(into.planes_EDB, into.scale_ELOG, units[0].contiguous(), bias_ER),
            Lines(out.planes_EDB, out.scale_ELOG, units[1].contiguous(), bias_EH),
            geometry.depths, geometry.inner, geometry.group, activation,
        )  # fmt: skip

    @property
    def used(self) -> int:
        return sum(self.used_L)

    def charge(self, place: int, expert: int, size: int) -> None:
        """Bytes that are about to be read."""
        self._charged_LE[place][expert] += size
        self.used_L[place] += size

    def charged(self, place: int, expert: int) -> int:
        """Bytes that an expert takes."""
        return self._charged_LE[place][expert]

    def release(self, place: int, expert: int) -> None:
        """An expert leaves."""
        for region in self.regions[place]:
            region.release(expert)
        self.used_L[place] -= self._charged_LE[place][expert]
        self._charged_LE[place][expert] = 0

    def planes(self, place: int, expert: int, start: int, stop: int) -> list[memoryview]:
        """Where some planes of both projections go."""
        found = []
        for plane in range(start, stop):
            for region in self.regions[place]:
                first = (expert * self.geometry.deepest + plane) * region.stride
                found.append(region.view[first : first + region.plane])
        return found

    def set_scales(self, place: int, expert: int, depth: int, held: Tensor) -> None:
        """Take a depth's scales of both projections, one behind the other in bytes."""
        offer, first = self.geometry.depths.index(depth), 0
        for region in self.regions[place]:
            part = held[first : first + region.scale].view(torch.float16)
            region.scale_ELOG[expert, offer] = part.reshape(region.scale_ELOG.shape[2:])
            first += region.scale
