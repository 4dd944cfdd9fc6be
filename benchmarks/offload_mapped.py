"""The same kernels on files that are mapped into memory, which the operating system reads as they are touched."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from offload_limit import forget
from offload_model import DEPTHS, EXPERTS, GROUP, scales
from torch import Tensor

from carpool.kernels.experts.activation import Activation
from carpool.kernels.experts.layout import Experts, Lines
from carpool.kernels.experts.operation import read_experts
from carpool.offloading.geometry import Geometry


class Mapped:
    """Experts in mapped files; scales stay in memory, in favour of this row.

    Attributes:
        told: whether the system is told of all experts of a layer before they are touched.
    """

    def __init__(self, folder: Path, geometry: Geometry, told: bool) -> None:
        self.told, self.layers, self.files = told, [], []
        generator = torch.Generator().manual_seed(0)
        shared = [scales(geometry, which, generator) for which in range(2)]
        for place in range(len(geometry.layers)):
            parts, mine = [], []
            for which in range(2):
                path = folder / f"{place}-{which}.planes"
                forget(path)
                fd = os.open(path, os.O_RDONLY)
                held = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
                os.close(fd)
                planes = torch.frombuffer(held, dtype=torch.uint8).reshape(EXPERTS, DEPTHS[-1], -1)
                parts.append(Lines(planes, shared[which], torch.full((EXPERTS,), 0.03)))
                mine.append((held, len(held) // EXPERTS))
            self.files.append(mine)
            self.layers.append(Experts(parts[0], parts[1], DEPTHS, geometry.inner, GROUP, Activation()))

    def read(self, place: int, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor, depth_NK: Tensor) -> Tensor:
        if self.told:
            for expert in ids_NK.unique().tolist():
                for held, size in self.files[place]:
                    held.madvise(mmap.MADV_WILLNEED, expert * size, size)
        return read_experts(hidden_NH.float(), ids_NK, weights_NK, depth_NK, self.layers[place])
