"""Decoding a model whose experts are on disk, against other ways of having them there: for `offload.py`."""

from __future__ import annotations

import mmap
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engines import GEOMETRIES, write_config
from offload_routing import BATCH, record, record_shared, sequences
from torch import Tensor, nn

from carpool.hosts.transformers import load_model
from carpool.kernels.experts.activation import Activation
from carpool.kernels.experts.layout import Experts, Lines
from carpool.kernels.experts.operation import read_experts
from carpool.offloading.cache import Scope
from carpool.offloading.geometry import Geometry
from carpool.offloading.memory import Memory
from carpool.offloading.misses import Misses
from carpool.offloading.readers import DEMAND, Job, Readers
from carpool.offloading.residency import Totals
from carpool.offloading.rules import rule_of
from carpool.offloading.runtime import Offloaded
from carpool.offloading.store import Store, write_store
from carpool.routing.spec import ALL_BITS

DEPTHS, GROUP, EXPERTS = (2, 3, 4, 6), 64, 64
STEPS = {1: (8, 16), 4: (4, 6), 16: (3, 4)}  # by batch: before anything is counted, and counted
START = 64  # token of a sequence at which decoding begins
SHARED = "xshare(budget=0.25)"
THREADS = 4
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


def random_layers(geometry: Geometry, keep: Path | None = None) -> Iterator[Experts]:
    """Experts of random bits; written as arrays into a folder, too, for what maps them."""
    generator = torch.Generator().manual_seed(0)
    for place in range(len(geometry.layers)):
        parts = []
        for which, size in enumerate(geometry.plane_bytes):
            shape = (EXPERTS, geometry.deepest, size)
            planes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            scales = torch.rand(
                EXPERTS,
                len(DEPTHS),
                geometry.blocks[which],
                geometry.groups[which],
                16,
                generator=generator,
            )
            steps = torch.tensor([2.0**-depth for depth in DEPTHS]).reshape(-1, 1, 1, 1)
            if keep is not None:
                planes.numpy().tofile(keep / f"{place}-{which}.planes")
            parts.append(
                Lines(
                    planes,
                    ((scales + 0.5) * steps).half(),
                    torch.full((EXPERTS,), 0.03),
                )
            )
        yield Experts(parts[0], parts[1], DEPTHS, geometry.inner, GROUP, Activation())


def replayed(chosen_RTLK: Tensor, layers: int, batch: int, steps: int) -> Tensor:
    """Of a trained model's layers, `[S, L, B, K]` for a deeper one: every few layers are those of other requests."""
    R, _, held, _ = chosen_RTLK.shape
    rows = [
        chosen_RTLK[
            [(row + batch * (place // held)) % R for row in range(batch)],
            START : START + steps,
            place % held,
        ]
        for place in range(layers)
    ]
    return torch.stack(rows).permute(2, 0, 1, 3).contiguous()


def counted() -> int:
    """Bytes that this process has had read from disks."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


@torch.no_grad()
def decode(
    model: Any,
    state: dict[str, Any],
    read: Read,
    ids_SLBK: Tensor,
    begin: Callable[[], None],
) -> dict[str, Any]:
    """Decodes one token a row and step; what is counted begins after some steps, where `begin` is called."""
    from transformers import DynamicCache

    state["read"] = read
    batch, cache = ids_SLBK.shape[2], DynamicCache()
    warm, steps = STEPS[batch]
    tokens = torch.randint(3, 8000, (batch, 1), generator=torch.Generator().manual_seed(1))
    begun = first = 0.0
    for step, ids_LBK in enumerate(ids_SLBK):
        if step == warm:
            begin()
            begun, first = time.perf_counter(), counted()
        state["step"], state["ids"] = step, ids_LBK
        model(tokens, past_key_values=cache, use_cache=True)
    took = time.perf_counter() - begun
    size = counted() - first
    return {
        "batch": batch, "tokens_per_s": batch * steps / took, "seconds_per_step": took / steps,
        "bytes_per_step": size / steps, "bytes_per_token": size / steps / batch, "read_per_s": size / took,
    }  # fmt: skip


def bandwidth(store: Store, seconds: float = 4.0) -> float:
    """Bytes a second that the same threads read of random experts into memory that is there, and nothing else."""
    geometry = store.geometry
    memory, generator = Memory(geometry, 1 << 60), torch.Generator().manual_seed(3)
    readers, count = (
        Readers(store, memory, THREADS),
        len(geometry.layers) * geometry.experts,
    )

    def read(picks: Sequence[int]) -> int:
        jobs = [Job(*divmod(one, geometry.experts), 0, geometry.deepest, DEMAND) for one in picks]
        for job in jobs:
            readers.submit(job)
        while left := [job for job in jobs if not job.done]:
            readers.wait(left)
        return sum(geometry.read(job.start, job.stop) for job in jobs)

    read(range(count))  # memory is there after that, and checksums are compared
    size, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        size += read(torch.randperm(count, generator=generator)[:64].tolist())
    took = time.perf_counter() - begun
    readers.close()
    return size / took


class Mapped:
    """The same kernels on files that are mapped into memory, which the operating system reads as they are touched.

    No limit of memory can be set for one process everywhere; here the pages of the experts that were used longest ago
    are given back, so that as many stay as the others may keep. Scales stay in memory, in favour of this row.
    """

    def __init__(self, folder: Path, layers: Sequence[Experts], experts: int) -> None:
        self.files, self.layers, self.room = [], [], experts
        self.used: OrderedDict[tuple[int, int], None] = OrderedDict()
        for place, layer in enumerate(layers):
            parts, mine = [], []
            for which, part in enumerate((layer.into, layer.out)):
                fd = os.open(folder / f"{place}-{which}.planes", os.O_RDONLY)
                os.fsync(fd)  # what was just written would stay in memory
                held = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
                size = len(held)
                planes = torch.frombuffer(held, dtype=torch.uint8).reshape(EXPERTS, DEPTHS[-1], -1)
                parts.append(Lines(planes, part.scale_ELOG, part.unit_E))
                mine.append((fd, held, size // EXPERTS))
            self.files.append(mine)
            self.layers.append(Experts(parts[0], parts[1], DEPTHS, layer.inner, GROUP, Activation()))
        for place in range(len(layers)):
            for expert in range(EXPERTS):
                self._drop(place, expert)

    def _drop(self, place: int, expert: int) -> None:
        for fd, held, size in self.files[place]:
            held.madvise(mmap.MADV_DONTNEED, expert * size, size)
            os.posix_fadvise(fd, expert * size, size, os.POSIX_FADV_DONTNEED)

    def read(
        self,
        place: int,
        hidden_NH: Tensor,
        ids_NK: Tensor,
        weights_NK: Tensor,
        depth_NK: Tensor,
    ) -> Tensor:
        made_NH = read_experts(hidden_NH.float(), ids_NK, weights_NK, depth_NK, self.layers[place])
        for expert in ids_NK.unique().tolist():
            self.used[place, expert] = None
            self.used.move_to_end((place, expert))
        while len(self.used) > self.room:
            self._drop(*self.used.popitem(last=False)[0])
        return made_NH


def study(folder: Path, files: Sequence[Any], layers: int) -> dict[str, Any]:
    """The table of speeds."""
    trained, tokenizer = load_model(None)
    ids_RT = sequences(tokenizer, files, 2 * BATCH)
    requests, told, right = record(trained, ids_RT)
    alone, (together, lost) = (
        torch.stack(requests.experts),
        record_shared(trained, ids_RT, SHARED),
    )
    shared = torch.stack(together.experts)
    shared = torch.where(shared < 0, shared[..., :1], shared)  # a free slot names the row's first expert again
    del trained
    model, state = build(folder, layers)
    hidden, inner = model.config.hidden_size, model.config.moe_intermediate_size
    geometry = Geometry(tuple(range(layers)), EXPERTS, hidden, inner, GROUP, DEPTHS)
    kept: list[Experts] = []

    def each() -> Iterator[Experts]:
        for one in random_layers(geometry, folder):
            yield one
            nothing = torch.zeros(0, dtype=torch.uint8)
            into, out = (Lines(nothing, part.scale_ELOG, part.unit_E) for part in (one.into, one.out))
            kept.append(Experts(into, out, DEPTHS, inner, GROUP, one.activation))

    path = folder / "experts.offload"
    write_store(path, geometry, "", enumerate(each()))
    expert = geometry.read(0, geometry.deepest)
    store = Store(path)
    speed = bandwidth(store)
    checked = store._checked  # every piece, so that what is measured is what happens from the second read on
    store.close()
    rows: list[dict[str, Any]] = []

    def run(
        share: float,
        batch: int,
        rule: str = "lru",
        on_miss: str = "exact",
        policy: str = "",
        ahead: bool = False,
        scope: Scope = "layer",
    ) -> None:
        ids_SLBK = replayed(shared if policy else alone, layers, batch, sum(STEPS[batch]))
        told_SLBK = replayed(told, layers, batch, sum(STEPS[batch]))

        def foretell(place: int, hidden_NH: Tensor) -> list[int]:
            return [one for one in told_SLBK[state["step"], place].unique().tolist() if one >= 0]

        opened = Offloaded(
            Store(path), int(share * layers * EXPERTS * expert), rule_of(rule), Misses.parse(on_miss),
            [Activation()] * layers, threads=THREADS, foretell=foretell if ahead else None, scope=scope,
        )  # fmt: skip
        opened.store._checked = checked
        if share == 1:
            for place in range(layers):
                all_NK = torch.arange(EXPERTS).reshape(1, -1)
                opened.read(
                    place,
                    torch.zeros(1, hidden),
                    all_NK,
                    torch.ones(all_NK.shape),
                    torch.full_like(all_NK, 16),
                )
        before: list[Totals] = []
        found = decode(
            model,
            state,
            opened.read,
            ids_SLBK,
            lambda: before.append(replace(opened.totals)),
        )
        totals, took = opened.totals, found["seconds_per_step"] * STEPS[batch][1]
        rows.append({
            "name": "carpool", "memory": share, "rule": rule, "on_miss": on_miss, "policy": policy, "prefetch": ahead,
            "scope": scope,
            **found, "hit_rate": (totals.hits - before[0].hits) / (totals.uses - before[0].uses),
            "waited": (totals.waited - before[0].waited) / took, "of_bandwidth": found["read_per_s"] / speed,
        })  # fmt: skip
        opened.close()
        print(rows[-1], flush=True)

    def mapped(share: float, batch: int) -> None:
        held = Mapped(folder, kept, int(share * layers * EXPERTS))
        found = decode(model, state, held.read, replayed(alone, layers, batch, sum(STEPS[batch])), lambda: None)
        rows.append(
            {
                "name": "mmap",
                "memory": share,
                "rule": "lru",
                "on_miss": "exact",
                "policy": "",
                **found,
            }
        )
        print(rows[-1], flush=True)

    for share in (0.25, 0.5):
        for batch in (1, 4, BATCH):
            run(share, batch)
            run(share, batch, on_miss="depth(3)")
            mapped(share, batch)
        run(share, BATCH, policy=SHARED)
        for batch in (1, 4):
            run(share, batch, ahead=True)
            run(share, batch, on_miss="depth([6, 3], [0.5])")
            run(share, batch, "lfu")
            for rule in ("lru", "layer_distance"):
                run(share, batch, rule, scope="model")
        for rule in ("lfru", "sequence_lfu"):
            run(share, 1, rule)
    run(1.0, 1)
    return {
        "geometry": f"Qwen3-30B-A3B's layers, {layers} of them, {EXPERTS} experts each", "expert_bytes": expert,
        "all_experts_bytes": expert * layers * EXPERTS, "depths": DEPTHS, "direct_read_per_s": speed, "steps": STEPS,
        "threads": THREADS, "policy": SHARED, "policy_kl": lost, "gates_right": right, "rows": rows,
    }  # fmt: skip
