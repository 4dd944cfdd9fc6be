"""The second half of `gpu_layer.py`: experts in planes, read at a depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_layer import SIZES, Layer, in_graph
from random_planes import random_experts
from torch import Tensor

from carpool.experts.stored import StoredExperts
from carpool.kernels.experts import on_device, reference
from carpool.kernels.experts.layout import Experts

DEPTHS, GROUP = (2, 3, 4, 6, 8), 64
ROWS = (1, 4, 16, 64, 256)
CHECKED = 8  # rows that are compared with plain torch


def stored(layer: Layer, device: torch.device) -> StoredExperts:
    """A layer's experts."""
    generator = torch.Generator(device).manual_seed(0)
    return random_experts(layer.experts, layer.hidden, layer.intermediate, DEPTHS, GROUP, generator)


def inputs(layer: Layer, rows: int, among: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, distinct experts of the first `among` ones, and weights."""
    generator = torch.Generator(device).manual_seed(rows)
    top_k = layer.rule.top_k
    ids = torch.rand(rows, among, generator=generator, device=device).argsort(-1)[:, :top_k].int().contiguous()
    hidden = torch.randn(rows, layer.hidden, generator=generator, device=device)
    if device.type == "cuda":  # Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers
        hidden = hidden.bfloat16()
    return hidden, ids, torch.rand(rows, top_k, generator=generator, device=device)


def error(layer: Layer, held: StoredExperts, experts: Experts, device: torch.device) -> float:
    """Of the kernels beside plain torch, each pair at a depth of its own, relative to the output."""
    hidden, ids, weights = inputs(layer, CHECKED, layer.experts, device)
    depth = torch.tensor(DEPTHS, device=device)[
        torch.arange(ids.numel(), device=device).reshape(ids.shape) % len(DEPTHS)
    ]
    found = on_device.read_experts(hidden, ids, weights, depth, experts).float()
    wanted = reference.read_experts(hidden, ids, weights, depth, held).float()
    return float((found - wanted).norm() / wanted.norm())


def reading(sizes: list[str], rows: list[int] | None, device: torch.device) -> Iterator[dict[str, Any]]:
    """A line for every layer's agreement; on a GPU one for every number of rows, of distinct experts and depth."""
    cuda = device.type == "cuda"
    bandwidth = copied(device) if cuda else 0.0
    for name in sizes:
        layer = SIZES[name]
        held = stored(layer, device)
        experts = Experts.of(held)
        yield {"layer": name, "experts_error": error(layer, held, experts, device)}
        if not cuda:
            continue
        for count in rows or ROWS:
            for among in sorted({layer.rule.top_k, min(32, layer.experts), layer.experts}):
                hidden, ids, weights = inputs(layer, count, among, device)
                distinct = len(ids.unique())
                for depth in (2, 4, 8):
                    asked = torch.full_like(ids, depth)
                    took = in_graph(_call(hidden, ids, weights, asked, experts))
                    speed = distinct * held.bytes_read(depth) / took / 1e3
                    yield {
                        "layer": name, "rows": count, "distinct_experts": distinct, "depth": depth,
                        "experts_microseconds": took, "gb_s": speed, "of_copy": speed / bandwidth,
                    }  # fmt: skip


def _call(*given: Any) -> Callable[[], Tensor]:
    return lambda: on_device.read_experts(*given)


def copied(device: torch.device) -> float:
    """GB/s that a copy within the device's memory reads and writes."""
    data = torch.zeros(1 << 28, device=device)
    other = torch.empty_like(data)
    return 2 * data.nbytes / in_graph(lambda: other.copy_(data)) / 1e3
