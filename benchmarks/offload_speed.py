"""Decoding a model whose experts are on disk, against other ways of having them there: for `offload.py`.

Files are made once in a folder that is kept, so that the table can be measured in pieces of a few minutes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from offload_limit import forget, limited, read_ahead
from offload_llama import llama_row
from offload_mapped import Mapped
from offload_model import (
    DEPTHS,
    EXPERTS,
    STEPS,
    THREADS,
    Counted,
    build,
    decode,
    geometry_of,
    random_layers,
    raw_rate,
    replayed,
)  # fmt: skip
from offload_routing import BATCH, record, record_shared, sequences

from carpool.hosts.transformers import load_model
from carpool.kernels.experts.activation import Activation
from carpool.offloading.cache import Scope
from carpool.offloading.misses import Misses
from carpool.offloading.residency import Totals
from carpool.offloading.rules import rule_of
from carpool.offloading.runtime import Offloaded
from carpool.offloading.store import Store, write_store

SHARED = "xshare(budget=0.25)"
FILE = "experts.offload"
SHARES = (0.25, 0.5)
READ_AHEAD = (128, 1024, 8192)  # KiB, for what maps files


def prepare(folder: Path, files: Sequence[Any], layers: int) -> dict[str, Any]:
    """The routing that is replayed, and files of experts; what is there is not made again."""
    geometry, routing = geometry_of(layers), folder / "routing.pt"
    if not routing.exists():
        trained, tokenizer = load_model(None)
        ids_RT = sequences(tokenizer, files, 2 * BATCH)
        requests, told, right = record(trained, ids_RT)
        together, lost = record_shared(trained, ids_RT, SHARED)
        shared = torch.stack(together.experts)
        shared = torch.where(shared < 0, shared[..., :1], shared)  # a free slot names the row's first expert again
        alone = torch.stack(requests.experts)
        # at random: what a router that was never trained does
        generator = torch.Generator().manual_seed(5)
        uniform = torch.rand(*alone.shape[:-1], EXPERTS, generator=generator).topk(alone.shape[-1], -1).indices
        torch.save(
            {"alone": alone, "shared": shared, "uniform": uniform, "told": told, "right": right, "lost": lost}, routing
        )
    if not (folder / FILE).exists():
        write_store(folder / FILE, geometry, "", enumerate(random_layers(geometry, folder)))
    return torch.load(routing)


class Bench:
    """A model in memory and its experts on disk.

    Attributes:
        rows: what was measured. speed: bytes a second that threads read directly, measured before and after each row.
    """

    def __init__(self, folder: Path, routing: dict[str, Any], layers: int) -> None:
        self.folder, self.routing, self.layers, self.rows = folder, routing, layers, []
        self.geometry, self.path = geometry_of(layers), folder / FILE
        self.model, self.state = build(folder, layers)
        self.expert = self.geometry.read(0, self.geometry.deepest)

    def ids(self, batch: int, name: str = "alone") -> torch.Tensor:
        return replayed(self.routing[name], self.layers, batch)

    def bytes_of(self, share: float) -> int:
        return int(share * self.layers * EXPERTS * self.expert)

    def carpool(
        self, share: float, batch: int, rule: str = "lru", on_miss: str = "exact", policy: str = "",
        ahead: bool = False, scope: Scope = "layer", first: bool = False, routing: str = "", within: bool = False,
    ) -> None:  # fmt: skip
        """A row of the runtime.

        Args:
            policy: whose routing is replayed. first: every read is a first one, with its checksum compared.
            routing: replayed otherwise. within: under the limit of memory that others get.
        """
        speed = raw_rate(self.path, self.expert)
        ids_SLBK, told_SLBK = self.ids(batch, routing or ("shared" if policy else "alone")), self.ids(batch, "told")

        def foretell(place: int, _: torch.Tensor) -> list[int]:
            return [one for one in told_SLBK[self.state["step"], place].unique().tolist() if one >= 0]

        def measure() -> None:
            opened = Offloaded(
                Store(self.path), self.bytes_of(share), rule_of(rule), Misses.parse(on_miss),
                [Activation()] * self.layers, threads=THREADS, foretell=foretell if ahead else None, scope=scope,
            )  # fmt: skip
            if not first:
                opened.store.trust()
            if share == 1:
                every = torch.arange(EXPERTS).reshape(1, -1)
                for place in range(self.layers):
                    hidden_NH = torch.zeros(1, self.geometry.hidden)
                    opened.read(place, hidden_NH, every, torch.ones(every.shape), torch.full_like(every, 16))
            before: list[tuple[Totals, float]] = []

            def begin() -> None:
                before.append((replace(opened.totals), opened.reading_seconds))

            found = decode(self.model, self.state, opened.read, ids_SLBK, begin)
            (old, seconds), totals, took = before[0], opened.totals, found["seconds_per_step"] * STEPS[batch][1]
            reading = opened.reading_seconds - seconds
            self._add(
                "carpool", share, batch, found, speed, rule=rule, on_miss=on_miss, policy=policy, prefetch=ahead,
                scope=scope, first=first, routing=routing, within=within,
                hit_rate=(totals.hits - old.hits) / (totals.uses - old.uses),
                waited=(totals.waited - old.waited) / took, reading=reading / took,
            )  # fmt: skip
            opened.close()

        if within:
            with limited(self.bytes_of(share)):
                measure()
        else:
            measure()

    def mapped(self, share: float, batch: int, told: bool = False, ahead: int = READ_AHEAD[0]) -> None:
        """A row of mapped files, under a limit of memory."""
        speed = raw_rate(self.path, self.expert)
        with read_ahead(self.path, ahead):
            held = Mapped(self.folder, self.geometry, told)
            with limited(self.bytes_of(share)):
                found = decode(self.model, self.state, held.read, self.ids(batch))
        del held, self.state["read"]  # pages that anything maps stay, whatever the next row's limit
        self._add("mmap, told" if told else "mmap", share, batch, found, speed, read_ahead_kib=ahead)

    def llama(self, kind: str, share: float) -> None:
        """Rows of llama.cpp on a mapped file, in processes of their own under a limit of memory."""
        for batch, ahead in product(STEPS, READ_AHEAD):
            speed = raw_rate(self.path, self.expert)
            with read_ahead(self.path, ahead):
                found = llama_row(self.folder, self.layers, self.ids, kind, share, batch, self.model)
            self._add(f"llama.cpp, {kind}", share, batch, found, speed, read_ahead_kib=ahead)

    def accelerated(self, share: float) -> None:
        """A row of accelerate's disk offload."""
        from offload_accelerate import offloaded

        speed = raw_rate(self.path, self.expert)
        with offloaded(self.folder, self.layers) as step, limited(self.bytes_of(share)):
            step()
            counts = Counted(1)
            counts.begin()
            for _ in range(STEPS[1][1]):
                step()
            found = counts.end()
        self._add("accelerate, 16 bits", share, 1, found, speed)

    def _add(self, name: str, share: float, batch: int, found: dict[str, Any], speed: float, **more: Any) -> None:
        # disks of virtual machines change their minds within seconds: the direct rate is that before and after a row
        speed = (speed + raw_rate(self.path, self.expert)) / 2
        row = {
            "name": name,
            "memory": share,
            "batch": batch,
            **found,
            "direct_read_per_s": speed,
            "load": os.getloadavg()[0],
            **more,
        }
        if reading := more.get("reading"):
            row["while_reading"] = found["read_per_s"] / reading / speed
        self.rows.append(row)
        shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
        print(shown, flush=True)


def _exact(bench: Bench, share: float) -> None:
    for batch in (1, 4, BATCH):
        bench.carpool(share, batch)
        bench.carpool(share, batch, ahead=True)
    bench.carpool(share, 1, first=True)


def _lossy(bench: Bench, share: float) -> None:
    for batch in (1, 4, BATCH):
        for on_miss in ("depth(3)", "depth(4)", "depth([6, 3], [0.5])"):
            bench.carpool(share, batch, on_miss=on_miss)


def _shared(bench: Bench, share: float) -> None:
    for on_miss in ("exact", "depth(3)"):
        bench.carpool(share, BATCH, on_miss=on_miss, policy=SHARED)
    bench.carpool(share, BATCH, policy=SHARED, first=True)


def _rules(bench: Bench, share: float) -> None:
    for batch in (1, 4):
        for rule in ("lfu", "lfru", "sequence_lfu"):
            bench.carpool(share, batch, rule)
        for rule in ("lru", "layer_distance", "hobbit"):
            bench.carpool(share, batch, rule, scope="model")


def _mapped(bench: Bench, share: float) -> None:
    for batch in (1, 4, BATCH):
        bench.carpool(share, batch, within=True)
        for ahead in READ_AHEAD:
            bench.mapped(share, batch, ahead=ahead)
        bench.mapped(share, batch, told=True)


PIECES = {
    f"{name} {share:g}": partial(measure, share=share)
    for share in SHARES
    for name, measure in (
        ("exact", _exact), ("lossy", _lossy), ("shared", _shared), ("rules", _rules), ("mapped", _mapped),
        ("llama.cpp", lambda bench, share: bench.llama("Q6_K", share)),
    )
} | {
    "resident": lambda bench: bench.carpool(1.0, 1),
    "accelerate": lambda bench: bench.accelerated(0.5),
}  # fmt: skip


def study(folder: Path, files: Sequence[Any], layers: int, pieces: Sequence[str]) -> dict[str, Any]:
    """Some pieces of the table of speeds."""
    routing = prepare(folder, files, layers)
    bench, rows = Bench(folder, routing, layers), {}
    forget(folder / FILE)
    for piece in pieces:
        bench.rows = []
        PIECES[piece](bench)
        rows[piece] = bench.rows
    return {
        "geometry": f"Qwen3-30B-A3B's layers, {layers} of them, {EXPERTS} experts each", "expert_bytes": bench.expert,
        "all_experts_bytes": bench.bytes_of(1), "depths": DEPTHS, "steps": STEPS, "threads": THREADS,
        "policy": SHARED, "policy_kl": routing["lost"], "gates_right": routing["right"], "rows": rows,
    }  # fmt: skip
