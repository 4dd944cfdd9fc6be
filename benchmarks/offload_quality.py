"""What reading misses shallow costs and saves, on the reference model: for `offload.py`.

Its experts are rounded into planes; exact is all that is stored. Tokens of held texts are decoded step by step with a
cache of keys and values, under teacher forcing; what is lost is measured against the same model with all in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from offload_routing import sequences
from torch import Tensor, nn

from carpool.experts.rounding import nested_round
from carpool.experts.stored import StoredExperts
from carpool.hosts.transformers import find_layers, load_model
from carpool.kernels.experts.activation import Activation
from carpool.kernels.experts.layout import Experts
from carpool.offloading.bootstrap import ratio
from carpool.offloading.geometry import Geometry
from carpool.offloading.misses import Misses
from carpool.offloading.rules import rule_of
from carpool.offloading.runtime import Offloaded
from carpool.offloading.store import Store, write_store
from carpool.routing.spec import ALL_BITS

DEPTHS, GROUP = (2, 3, 4, 6), 32
REQUESTS, TOKENS = 8, 64
WAYS = (
    "exact", "depth(4)", "depth(3)", "depth(2)", "depth([6, 3], [0.5])", "depth([6, 3], [0.25])",
    "depth([6, 3, 2], [0.3, 0.7])", "depth([6, 3, 0], [0.3, 0.8])",
    "depth(3) | floor(0.3)", "depth(2) | floor(0.3)",
)  # fmt: skip


class OnDisk(nn.Module):
    """In the place of a layer's experts."""

    def __init__(self, place: int, state: dict[str, Any]) -> None:
        super().__init__()
        self.place, self.state = place, state

    def forward(self, hidden_NH: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        opened: Offloaded = self.state["opened"]
        return opened.read(self.place, hidden_NH, ids_NK, weights_NK, torch.full_like(ids_NK, ALL_BITS))


@torch.no_grad()
def decode(model: Any, ids_BT: Tensor) -> Tensor:
    """Logarithms of what is predicted, `[B, T, V]`."""
    from transformers import DynamicCache

    cache, found = DynamicCache(), []
    for token in range(ids_BT.shape[1]):
        made = model(ids_BT[:, token : token + 1], past_key_values=cache, use_cache=True)
        found.append(made.logits[:, -1].log_softmax(-1))
    return torch.stack(found, 1)


def study(files: Sequence[Any]) -> dict[str, Any]:
    """Every way of reading misses, at two sizes of memory, alone and in a batch."""
    model, tokenizer = load_model(None)
    ids_RT = sequences(tokenizer, files, REQUESTS)[:, :TOKENS]
    layers = find_layers(model)
    experts = layers[0].num_experts

    def each() -> Iterator[Experts]:
        for layer in layers:
            weights = dict(layer.experts.named_parameters())
            parts = (nested_round(weights[name].detach(), DEPTHS, GROUP) for name in ("gate_up_proj", "down_proj"))
            yield Experts.of(StoredExperts(*parts))

    sizes = model.config.hidden_size, model.config.moe_intermediate_size
    geometry = Geometry(tuple(range(len(layers))), experts, *sizes, GROUP, DEPTHS)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path, state = Path(folder) / "experts.offload", {}
        write_store(path, geometry, "", enumerate(each()))
        for place, layer in enumerate(layers):
            layer.block.experts = OnDisk(place, state)
        whole = geometry.read(0, DEPTHS[-1]) * len(layers) * experts

        def run(share: float, on_miss: str, batch: int) -> tuple[Tensor, Offloaded]:
            opened = Offloaded(
                Store(path),
                int(share * whole),
                rule_of("lru"),
                Misses.parse(on_miss),
                [Activation()] * len(layers),
            )
            state["opened"] = opened
            logs = torch.cat([decode(model, rows_BT) for rows_BT in ids_RT.split(batch)])
            opened.close()
            return logs, opened

        for batch in (1, REQUESTS):
            stock, _ = run(1.0, "exact", batch)
            for share in (0.25,) if batch == 1 else (0.25, 0.5):
                exact = None
                for on_miss in WAYS:
                    logs, opened = run(share, on_miss, batch)
                    lost_RT = (stock.exp() * (stock - logs)).sum(-1)
                    kl, low, high = ratio(lost_RT.sum(1), torch.full((REQUESTS,), float(TOKENS)))
                    size = opened.bytes_read / ids_RT.numel()
                    exact = exact or size
                    rows.append({
                        "memory": share, "batch": batch, "on_miss": on_miss, "kl": kl, "low": low, "high": high,
                        "bytes_per_token": size, "over_exact": size / exact, "hit_rate": opened.totals.hit_rate,
                    })  # fmt: skip
                    print(rows[-1], flush=True)
    return {
        "requests": REQUESTS,
        "tokens": TOKENS,
        "depths": DEPTHS,
        "group": GROUP,
        "rows": rows,
    }
