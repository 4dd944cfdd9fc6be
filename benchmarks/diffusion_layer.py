"""Time of one MoE layer over a block of rows against the experts it reads, in transformers on the CPU.

    python benchmarks/diffusion_layer.py --output docs/results/diffusion-layer.json     # about ten minutes on two cores
    python benchmarks/diffusion_layer.py --quick --output /tmp/quick.json               # proves that it runs

Random weights with the layer geometry of block-diffusion models; one forward of the layer is one denoising step of a
block of 32 rows. The rows of a block are made alike to the degree at which the router reads as many experts as was
published for the real model. Both ways of transformers that read active experts only are timed (never `batched_mm`,
which copies an expert for every pair): stock, policies through `carpool.share`'s hooks, for each policy its ideal
(random sets of the same union, and its own ids, neither with a policy running), and unions from small to all. Every
round times each state once on the same block, in random order. A cell whose checks fail gets no times.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import machine, read_bandwidth
from moe_layers import INPUTS, LAYERS, Layer, blocks_alike, build, spread
from torch import Tensor
from vllm_rounds import paired

import carpool
from carpool.artefacts.files import write_text
from carpool.hosts.transformers import attach
from carpool.routing.batch import Batch

SEED = 0
POLICIES = ("des_seq(k0=3)", "des_seq(k0=2)", "des_vote(size=38)", "des_vote(size=25)")
UNIONS = (8, 16, 32, 48, 64, 96, 128, 192, 256)
IMPLEMENTATIONS = ("eager", "grouped_mm")


class Bench:
    """One layer in one implementation, switched between states."""

    def __init__(self, model: Any, layer: Layer, implementation: str, inputs: list[Tensor]) -> None:
        model.set_experts_implementation(implementation)
        self.model, self.layer, self.inputs = model, layer, inputs
        self.attachment = attach(model)
        self.found = self.attachment.layers[0]
        rows = inputs[0].shape[1]
        self.batch = Batch.of(rows, request_N=torch.zeros(rows, dtype=torch.int64), num_requests=1)
        self.weights_NK = torch.full((rows, layer.top_k), 1 / layer.top_k, dtype=inputs[0].dtype)

    def forward(self, place: int) -> Tensor:
        return self.found.block(self.inputs[place])

    def run(self, text: str) -> Any:
        """A run of a policy, checked and warm."""
        with carpool.share(self.model, text, batch=self.batch) as run:
            self.forward(0)
        return run

    @contextmanager
    def sharing(self, run: Any) -> Iterator[None]:
        self.attachment.run = run
        try:
            yield
        finally:
            self.attachment.run = None

    @contextmanager
    def forced(self, ids_NK: Tensor) -> Iterator[None]:
        """The router does its work, and other ids come out."""

        def replace(module: Any, args: Any, output: tuple) -> tuple:
            slots = list(output)
            _, weights, ids = self.found.unpack(output)
            slots[weights], slots[ids] = self.weights_NK.to(output[weights].dtype), ids_NK.to(output[ids].dtype)
            return tuple(slots)

        handle = self.found.router.register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()

    def received(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and weights that the experts get, and the layer's output."""
        seen: list[tuple[Tensor, Tensor]] = []
        handle = self.found.experts.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((*args, *kwargs.values())[1:3]), with_kwargs=True
        )
        output = self.forward(place)
        handle.remove()
        return seen[0][0].long(), seen[0][1], output


def check(bench: Bench, runs: dict[str, Any]) -> tuple[list[str], dict[str, list[Tensor]]]:
    """What is wrong, and the ids of every state on every input."""
    failed: list[str] = []
    ids: dict[str, list[Tensor]] = {"stock": []}
    with bench.sharing(bench.run(f"des_vote(size={bench.layer.experts})")):
        full = bench.forward(1)
    if not torch.equal(full, bench.forward(1)):
        failed.append("a coreset of all experts changes the output")
    for place in range(INPUTS):
        ids["stock"].append(bench.received(place)[0])
    for text, run in runs.items():
        ids[text] = []
        for place in range(INPUTS):
            before = sum(row.union for row in run.report())
            with bench.sharing(run):
                ids_NK, weights_NK, output = bench.received(place)
            ids[text].append(ids_NK)
            if sum(row.union for row in run.report()) - before != len(ids_NK.unique()):
                failed.append(f"{text}: the counters say another union than the experts got")
            if not torch.allclose(output, expected(bench, place, ids_NK, weights_NK), rtol=0.02, atol=0.02):
                failed.append(f"{text}: the output is not that of the experts it names")
        if run.changed_rows() == 0:
            failed.append(f"{text}: no row changed")
        if "size=" in text and max(len(found.unique()) for found in ids[text]) > run.plan.policy.size:
            failed.append(f"{text}: more experts than its size")
    return sorted(set(failed)), ids


def expected(bench: Bench, place: int, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The layer's output, expert by expert and row by row."""
    experts, x_NH = bench.found.experts, bench.inputs[place][0]
    y_NH = torch.zeros_like(x_NH, dtype=torch.float32)
    for n, (ids_K, weights_K) in enumerate(zip(ids_NK.tolist(), weights_NK.tolist(), strict=True)):
        for expert, weight in zip(ids_K, weights_K, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x_NH[n]).chunk(2)
            y_NH[n] += weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)).float()
    shared = getattr(bench.found.block, "shared_experts", None)
    return (y_NH if shared is None else y_NH + shared(x_NH)).to(x_NH.dtype).unsqueeze(0)


def measure(bench: Bench, policies: list[str], rounds: int) -> dict[str, Any]:
    """One cell: checks first, then rounds."""
    runs = {text: bench.run(text) for text in policies}
    failed, ids = check(bench, runs)
    if failed:
        return {"failed": "; ".join(failed), "states": {}}
    layer, rows = bench.layer, bench.inputs[0].shape[1]
    generator = torch.Generator().manual_seed(SEED)

    def made(union: int) -> Tensor:
        return spread(union, rows, layer, generator)

    for text in policies:
        ids[f"ideal: {text}"] = [made(len(found.unique())) for found in ids[text]]
        ids[f"replayed: {text}"] = ids[text]
    for union in (u for u in UNIONS if layer.top_k <= u <= min(layer.experts, rows * layer.top_k)):
        ids[f"union: {union}"] = [made(union) for _ in range(INPUTS)]
    times: dict[str, list[float]] = {name: [] for name in ids}
    choices: dict[str, list[float]] = {name: [] for name in ("stock", *policies)}
    shuffle = random.Random(SEED)
    for number in range(rounds):
        place = number % INPUTS
        for name in shuffle.sample(list(times), len(times)):
            with state(bench, runs, name, ids[name][place]):
                begin = time.perf_counter()
                bench.forward(place)
                times[name].append(time.perf_counter() - begin)
        for name in shuffle.sample(list(choices), len(choices)):
            with state(bench, runs, name, ids[name][place]):
                begin = time.perf_counter()
                bench.found.router(bench.inputs[place].view(rows, -1))
                choices[name].append(time.perf_counter() - begin)
    return {"failed": "", "states": {name: summary(name, ids[name], times, choices) for name in times}}


@contextmanager
def state(bench: Bench, runs: dict[str, Any], name: str, ids_NK: Tensor) -> Iterator[None]:
    if name == "stock":
        yield
    else:
        with bench.sharing(runs[name]) if name in runs else bench.forced(ids_NK):
            yield


def summary(
    name: str, ids: list[Tensor], times: dict[str, list[float]], choices: dict[str, list[float]]
) -> dict[str, Any]:
    """Time of a state and ratios to others of the same rounds, with intervals."""
    seconds = np.array(times[name])
    row: dict[str, Any] = {
        "union": sum(len(found.unique()) for found in ids) / len(ids),
        "layer_ms": 1000 * float(np.median(seconds)),
        "seconds": [round(value, 7) for value in times[name]],
    }
    if name in choices:
        row["router_ms"] = 1000 * float(np.median(choices[name]))
    for against in ("stock", f"ideal: {name}", f"replayed: {name}"):
        if against in times and against != name:
            row[f"speed_over_{against.split(':')[0]}"] = asdict(paired(np.array(times[against]), seconds))
    return row


@torch.inference_mode()
def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    content: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {"cells": {}}
    for name in options.geometry:
        layer = LAYERS[name]
        model = build(layer, dtype, SEED)
        inputs, alike, union = blocks_alike(layer, attach(model).layers[0].router, options.rows, dtype, SEED)
        for implementation in options.implementation:
            cell = {
                "geometry": name, "implementation": implementation, "dtype": options.dtype, "rows": options.rows,
                "threads": options.threads, "experts": layer.experts, "top_k": layer.top_k,
                "expert_mb": layer.expert_bytes(dtype.itemsize) / 1e6, "published_union": layer.union,
                "published_in": layer.source, "natural_union": union, "correlation_of_rows": alike,
                "rounds": options.rounds, "seed": SEED, "read_bandwidth_gb_s": read_bandwidth(options.gib),
                "load_before": os.getloadavg()[0],
            }  # fmt: skip
            cell |= measure(Bench(model, layer, implementation, inputs), options.policy, options.rounds)
            cell["load_after"] = os.getloadavg()[0]
            content["cells"][f"{name} {implementation} {options.dtype} threads={options.threads}"] = cell
            show(cell)
            write_text(options.output, json.dumps(content | {"machine": machine()}, indent=1) + "\n")
        del model
        gc.collect()  # layers of two geometries do not fit side by side everywhere


def show(cell: dict[str, Any]) -> None:
    print(f"\n{cell['geometry']} {cell['implementation']}: {cell['failed'] or 'checks passed'}", flush=True)
    for name, row in cell["states"].items():
        ratios = [
            f"{row[key]['value']:.3f} [{row[key]['low']:.3f}, {row[key]['high']:.3f}] of {key.split('_')[-1]}"
            for key in row
            if key.startswith("speed_over_")
        ]
        print(f"  {name:30s} {row['layer_ms']:9.2f} ms  union {row['union']:6.1f}  {', '.join(ratios)}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=LAYERS, nargs="+", default=["llada2.0-mini", "sdar-30b-a3b"])
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rows", type=int, default=32, help="of a block")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--policy", nargs="+", default=list(POLICIES))
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="a tiny layer; its times mean nothing")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    options.gib = 1.0
    if options.quick:
        options.geometry, options.rounds, options.threads, options.gib = ["tiny"], 6, 1, 0.05
        options.policy = ["des_seq(k0=1)", "des_vote(size=8)"]
    return options


if __name__ == "__main__":
    main()
