"""A model of random weights whose experts are elsewhere, and what decodes it: for `offload_speed.py`."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engines import GEOMETRIES, write_config
from torch import Tensor, nn

from carpool.kernels.experts.activation import Activation
from carpool.kernels.experts.layout import Experts, Lines
from carpool.offloading.geometry import Geometry
from carpool.routing.spec import ALL_BITS

DEPTHS, GROUP, EXPERTS = (2, 3, 4, 6), 64, 64
STEPS = {1: (8, 16), 4: (4, 6), 16: (3, 4)}  # by batch: before anything is counted, and counted
START = 64  # token of a sequence at which decoding begins
THREADS = 4  # that read
Read = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]


class OnDisk(nn.Module):
    """In the place of a layer's experts; who is chosen is said from outside."""

    def __init__(self, place: int, state: dict[str, Any]) -> None:
        super().__init__()
        self.place, self.state = place, state

    def forward(self, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        ids_NK = self.state["ids"][self.place]
        whole_NK = torch.full_like(ids_NK, ALL_BITS)
        made_NH = self.state["read"](self.place, hidden_NH, ids_NK, weights_NK, whole_NK)
        return made_NH.to(hidden_NH.dtype)


def build(folder: Path, layers: int) -> tuple[Any, dict[str, Any]]:
    """A model of bfloat16 weights with its experts elsewhere."""
    from transformers import AutoConfig, AutoModelForCausalLM

    geometry = GEOMETRIES["qwen3-30b-a3b"]
    geometry = replace(geometry, experts=EXPERTS, config=geometry.config | {"num_experts": EXPERTS})
    config = AutoConfig.from_pretrained(write_config(geometry, layers, folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state: dict[str, Any] = {}
    for place, block in enumerate(model.model.layers):
        block.mlp.experts = OnDisk(place, state)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, one in list(module.named_parameters(recurse=False)):
            value = torch.ones(one.shape) if one.dim() == 1 else torch.randn(one.shape, generator=generator)
            value = value if one.dim() == 1 else value * one.shape[-1] ** -0.5
            setattr(module, name, nn.Parameter(value.bfloat16(), requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval(), state


def geometry_of(layers: int) -> Geometry:
    """Of the file of experts."""
    shape = GEOMETRIES["qwen3-30b-a3b"]
    return Geometry(tuple(range(layers)), EXPERTS, shape.hidden, shape.intermediate, GROUP, DEPTHS)


def random_layers(geometry: Geometry, keep: Path) -> Iterator[Experts]:
    """Experts of random bits; their planes are written as arrays into a folder, too, for what maps them."""
    generator = torch.Generator().manual_seed(0)
    for place in range(len(geometry.layers)):
        parts = []
        for which, size in enumerate(geometry.plane_bytes):
            shape = (EXPERTS, geometry.deepest, size)
            planes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            planes.numpy().tofile(keep / f"{place}-{which}.planes")
            parts.append(Lines(planes, scales(geometry, which, generator), torch.full((EXPERTS,), 0.03)))
        yield Experts(parts[0], parts[1], DEPTHS, geometry.inner, GROUP, Activation())


def scales(geometry: Geometry, which: int, generator: torch.Generator) -> Tensor:
    """Random ones of a layer's projection, float16."""
    shape = (EXPERTS, len(DEPTHS), geometry.blocks[which], geometry.groups[which], 16)
    steps = torch.tensor([2.0**-depth for depth in DEPTHS]).reshape(-1, 1, 1, 1)
    return ((torch.rand(shape, generator=generator) + 0.5) * steps).half()


def replayed(chosen_RTLK: Tensor, layers: int, batch: int) -> Tensor:
    """Of a trained model's layers, `[S, L, B, K]` for a deeper one: every few layers are those of other requests."""
    R, _, held, _ = chosen_RTLK.shape
    steps = slice(START, START + sum(STEPS[batch]))
    rows = [
        chosen_RTLK[[(row + batch * (place // held)) % R for row in range(batch)], steps, place % held]
        for place in range(layers)
    ]
    return torch.stack(rows).permute(2, 0, 1, 3).contiguous()


def counted() -> int:
    """Bytes that this process has had read from disks."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


class Counted:
    """Time and bytes of the steps that count, from `begin` on."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def begin(self) -> None:
        self.size, self.begun = counted(), time.perf_counter()

    def end(self) -> dict[str, Any]:
        steps = STEPS[self.batch][1]
        took, size = time.perf_counter() - self.begun, counted() - self.size
        return {
            "batch": self.batch, "tokens_per_s": self.batch * steps / took, "seconds_per_step": took / steps,
            "bytes_per_step": size / steps, "bytes_per_token": size / steps / self.batch, "read_per_s": size / took,
        }  # fmt: skip


@torch.no_grad()
def decode(
    model: Any, state: dict[str, Any], read: Read, ids_SLBK: Tensor, begin: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Decodes one token a row and step; what is counted begins after some steps, where `begin` is called."""
    from transformers import DynamicCache

    state["read"] = read
    batch, cache = ids_SLBK.shape[2], DynamicCache()
    counts = Counted(batch)
    tokens = torch.randint(3, 8000, (batch, 1), generator=torch.Generator().manual_seed(1))
    for step, ids_LBK in enumerate(ids_SLBK):
        if step == STEPS[batch][0]:
            begin()
            counts.begin()
        state["step"], state["ids"] = step, ids_LBK
        model(tokens, past_key_values=cache, use_cache=True)
    return counts.end()


def raw_rate(path: Path, block: int, seconds: float = 2.0) -> float:
    """Bytes a second that as many threads read directly, blocks of an expert's size into memory that is there."""
    fd, count = os.open(path, os.O_RDONLY | os.O_DIRECT), path.stat().st_size // block - 1
    sizes, stop = [0] * THREADS, time.perf_counter() + seconds

    def work(place: int) -> None:
        generator = torch.Generator().manual_seed(place)
        held = mmap.mmap(-1, block)
        held.write(b"\1" * block)  # pages
        while time.perf_counter() < stop:
            at = int(torch.randint(count, (1,), generator=generator)) * block
            sizes[place] += os.preadv(fd, [memoryview(held)], at)

    begun = time.perf_counter()
    threads = [threading.Thread(target=work, args=(place,)) for place in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begun
    os.close(fd)
    return sum(sizes) / took
