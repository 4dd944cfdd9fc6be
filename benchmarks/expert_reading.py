"""What reading experts at a depth costs on this CPU: the routed experts of one layer, beside what else computes them.

    python benchmarks/expert_reading.py --output docs/results/expert-reading.json
    python benchmarks/expert_reading.py --quick     # a rehearsal at small sizes

Random weights in the geometry of real models, random routing with distinct experts. In every round all states of a
cell run once, in turn, each on another set of rows than the round before and after a read of other memory that leaves
nothing of theirs in caches, as other layers do in a model; times are medians over rounds. `bf16 ideal`
is what the experts' bf16 bytes take at the streaming rate that is measured in every round beside the others. Peers
compute the same pairs expert by expert: torch's bf16 products, ATen's 8-bit and 4-bit ones. Bits include scales.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from engines import as_json, machine
from random_planes import random_experts

from carpool.kernels.experts import build
from carpool.kernels.experts.layout import Experts
from carpool.kernels.experts.operation import read_experts

DEPTHS, GROUP = (2, 3, 4, 6, 8), 64
SEED, SETS = 0, 4  # sets of rows that are taken in turn
MIXED = {  # shares of experts by depth
    "mean 4.5": {3: 0.25, 4: 0.5, 6: 0.25}, "mean 3.5": {2: 0.25, 3: 0.25, 4: 0.5}, "mean 2.5": {2: 0.75, 3: 0.25},
}  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """Sizes of a layer."""

    hidden: int
    inner: int
    experts: int
    top_k: int


GEOMETRIES = {
    "qwen3-30b-a3b": Geometry(2048, 768, 128, 8), "olmoe-1b-7b": Geometry(2048, 1024, 64, 8),
    "gpt-oss-20b": Geometry(2880, 2880, 32, 4), "tiny": Geometry(128, 64, 16, 4),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Peers:
    """The layer's experts in other forms; None where this torch has no such product on this processor."""

    into: list[Any]
    out: list[Any]
    product: Callable[[Tensor, Any], Tensor]
    bits: float

    @classmethod
    def all(cls, layer: Geometry, generator: torch.Generator) -> dict[str, Peers]:
        """Every form that works here."""
        found = {}
        for name, (make, product, bits) in FORMS.items():
            try:
                into, out = (
                    [make(torch.randn(rows, width, generator=generator) * width**-0.5) for _ in range(layer.experts)]
                    for rows, width in ((2 * layer.inner, layer.hidden), (layer.hidden, layer.inner))
                )
                made = cls(into, out, product, bits)
                made(torch.randn(1, layer.hidden), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
            except RuntimeError as error:
                print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            found[name] = made
        return found

    def __call__(self, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        hidden_NH = hidden_NH.bfloat16()
        result_NH = torch.zeros_like(hidden_NH)
        for expert in ids_NK.unique().tolist():
            row, slot = (ids_NK == expert).nonzero(as_tuple=True)
            gate, up = self.product(hidden_NH[row], self.into[expert]).chunk(2, -1)
            made = self.product(torch.nn.functional.silu(gate) * up, self.out[expert])
            result_NH.index_add_(0, row, made * weights_NK[row, slot].bfloat16().unsqueeze(-1))
        return result_NH


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(-1) / 127
    return (weight / scale.unsqueeze(-1)).round().to(torch.int8), scale.bfloat16()


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 16, weight.shape, dtype=torch.int32)
    scales = torch.full((weight.shape[1] // GROUP, weight.shape[0], 2), 0.01, dtype=torch.bfloat16)
    return torch._convert_weight_to_int4pack_for_cpu(codes, 1), scales


FORMS: dict[str, tuple[Any, Any, float]] = {
    "torch bf16": (lambda weight: weight.bfloat16(), torch.nn.functional.linear, 16),
    "ATen int8": (_int8, lambda x, w: torch._weight_int8pack_mm(x, *w), 8),
    "ATen int4": (_int4, lambda x, w: torch._weight_int4pack_mm_for_cpu(x, w[0], GROUP, w[1]), 4 + 32 / GROUP),
}


def states(
    layer: Geometry, batch: int, experts: Experts, peers: dict[str, Peers]
) -> tuple[dict[str, Callable[[int], Any]], dict[str, float], float]:
    """Calls by name, the bits a weight that each reads, and the mean number of distinct experts of a set of rows."""
    generator = torch.Generator().manual_seed(SEED + batch)
    sets = []
    for _ in range(SETS):
        ids = torch.rand(batch, layer.experts, generator=generator).argsort(-1)[:, : layer.top_k].contiguous()
        sets.append((torch.randn(batch, layer.hidden, generator=generator), ids, torch.rand(batch, layer.top_k)))
    calls: dict[str, Callable[[int], Any]] = {}
    bits: dict[str, float] = {}
    by_expert = {f"depth {depth}": torch.full((layer.experts,), depth) for depth in DEPTHS}
    for name, shares in MIXED.items():
        levels, counts = list(shares), [round(share * layer.experts) for share in shares.values()]
        order = torch.randperm(layer.experts, generator=generator)
        mixed = torch.full((layer.experts,), levels[-1])
        mixed[order[: sum(counts[:-1])]] = torch.tensor(levels[:-1]).repeat_interleave(torch.tensor(counts[:-1]))
        by_expert[name] = mixed
    for name, depth_E in by_expert.items():
        asked = [depth_E[ids] for _, ids, _ in sets]
        calls[name] = lambda i, asked=asked: read_experts(*sets[i], asked[i], experts)
        used = torch.cat([depth_E[ids.unique()] for _, ids, _ in sets])
        bits[name] = float(used.float().mean()) + 16 / GROUP
    for name, peer in peers.items():
        calls[name] = lambda i, peer=peer: peer(*sets[i])
        bits[name] = peer.bits
    return calls, bits, statistics.mean(len(ids.unique()) for _, ids, _ in sets)


def cells(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for every number of threads and rows."""
    layer, generator = GEOMETRIES[name], torch.Generator().manual_seed(SEED)
    stored = random_experts(layer.experts, layer.hidden, layer.inner, DEPTHS, GROUP, generator)
    experts, peers = Experts.of(stored), Peers.all(layer, generator)
    stream = torch.randint(0, 1 << 60, (options.stream_mb << 17,), generator=generator)
    whole = 3 * layer.hidden * layer.inner
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batches:
            calls, bits, union = states(layer, batch, experts, peers)
            calls["stream"] = lambda i: stream.sum()
            seconds: dict[str, list[float]] = {state: [] for state in calls}
            for turn in range(options.rounds + 1):  # the first one warms up
                for state, call in calls.items():
                    stream.sum()  # what the state before has read of these experts leaves the caches
                    start = time.perf_counter()
                    call(turn % SETS)
                    if turn:
                        seconds[state].append(time.perf_counter() - start)
            median = {state: statistics.median(times) for state, times in seconds.items()}
            rate = stream.nbytes / median.pop("stream")
            rows = {
                state: {
                    "ms": 1e3 * taken,
                    "bits": bits[state],
                    "gb_s": union * whole * bits[state] / 8 / taken / 1e9,
                    "of_stream": union * whole * bits[state] / 8 / taken / rate,
                    "over_bf16_ideal": 2 * union * whole / rate / taken,
                    "quartiles_ms": [1e3 * value for value in statistics.quantiles(seconds[state], n=4)[::2]],
                }
                for state, taken in median.items()
            }
            yield {
                "geometry": name,
                "threads": threads,
                "batch": batch,
                "distinct_experts": union,
                "stream_gb_s": rate / 1e9,
                "bf16_ideal_ms": 2e3 * union * whole / rate,
                "states": rows,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometries", nargs="+", choices=GEOMETRIES, default=[*GEOMETRIES][:3])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--stream-mb", type=int, default=512)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.geometries, options.batches, options.rounds, options.stream_mb = ["tiny"], [1, 4], 2, 1
    if not build.ready():
        raise SystemExit("the kernels cannot be built here")
    found = []
    for name in options.geometries:
        for cell in cells(name, options):
            found.append(cell)
            print(
                cell["geometry"],
                cell["threads"],
                cell["batch"],
                {k: round(v["ms"], 3) for k, v in cell["states"].items()},
            )
            if options.output:
                about = {
                    "machine": machine(), "instructions": build.instructions()[0], "seed": SEED, "group": GROUP,
                    "rounds": options.rounds,
                }  # fmt: skip
                options.output.write_text(as_json(about | {"cells": found}))


if __name__ == "__main__":
    main()
