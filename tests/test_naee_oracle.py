"""NAEE's exhaustive search as the yardstick of cheaper rankings: which experts of a layer may go?

A random layer of eight experts of unequal size. Keeping a set means that tokens are rerouted inside it, and the loss
is the distance of the layer's output from the full layer's. Experts of a random layer have nothing to do with one
another, so a kept expert of large output also harms the tokens that are rerouted to it: no ranking that scores experts
one by one comes near the optimum here, and EASY-EP is not better than counting. Trained layers are another matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import pytest
import torch
from torch import Tensor

from carpool import Batch, RouteSpec, parse, route
from carpool.calibrate.energy import Energy

E, K, H, N, KEPT = 8, 2, 6, 96, 5
SPEC = RouteSpec(K)


@dataclass(frozen=True, eq=False)
class Layer:
    logits_NE: Tensor
    outputs_NEH: Tensor
    hidden_NH: Tensor

    def output(self, text: str) -> Tensor:
        """The layer's output `[N, H]` under an allow list."""
        routing = route(parse(text), SPEC, self.logits_NE, Batch.of(N)).routing
        index_NKH = routing.ids_NK.long().unsqueeze(-1).expand(-1, -1, H)
        return (self.outputs_NEH.gather(1, index_NKH) * routing.weights_NK.unsqueeze(-1)).sum(1)


def random_layer(seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(N, H, generator=generator)
    gate_EH = torch.randn(E, H, generator=generator)
    size_E11 = torch.randn(E, 1, 1, generator=generator).exp()
    up_EHH, down_EHH = (torch.randn(E, H, H, generator=generator) / H**0.5 for _ in range(2))
    inner_NEH = torch.einsum("nh,ehi->nei", hidden_NH, up_EHH).relu()
    outputs_NEH = torch.einsum("nei,eih->neh", inner_NEH, down_EHH * size_E11)
    return Layer(hidden_NH @ gate_EH.T, outputs_NEH, hidden_NH)


def enumerated(layer: Layer) -> dict[tuple[int, ...], float]:
    full_NH = layer.output(f"allow_list({list(range(E))})")
    return {
        kept: float((layer.output(f"allow_list({list(kept)})") - full_NH).double().norm())
        for kept in combinations(range(E), KEPT)
    }


def best(score_E: Tensor) -> tuple[int, ...]:
    return tuple(sorted(score_E.topk(KEPT).indices.tolist()))


def rankings(layer: Layer) -> dict[str, tuple[int, ...]]:
    native = SPEC.native(layer.logits_NE)
    energy = Energy(E, K, H)
    energy.update(layer.hidden_NH, layer.outputs_NEH, native.ids_NK, native.weights_NK, layer.hidden_NH)
    result = energy.result()
    return {
        "easy_ep": best(result["easy_ep"]),
        "frequency": best(energy.coverage_E),
        "gate": best(result["gate_sum"]),
    }


@pytest.fixture(scope="module")
def regrets() -> dict[str, list[float]]:
    """Loss over the optimum's, minus 1, on eight layers; `any` is the mean over all sets."""
    found: dict[str, list[float]] = {"easy_ep": [], "frequency": [], "gate": [], "any": []}
    for seed in range(8):
        layer = random_layer(seed)
        losses = enumerated(layer)
        least = min(losses.values())
        assert least > 0
        for name, kept in rankings(layer).items():
            found[name].append(losses[kept] / least - 1)
        found["any"].append(fmean(losses.values()) / least - 1)
    print({name: round(fmean(values), 3) for name, values in found.items()})
    return found


def test_nothing_beats_the_exhaustive_search(regrets: dict[str, list[float]]) -> None:
    assert min(map(min, regrets.values())) >= 0


def test_rankings_beat_a_set_drawn_at_random(regrets: dict[str, list[float]]) -> None:
    mean = {name: fmean(values) for name, values in regrets.items()}
    assert max(mean["easy_ep"], mean["gate"], mean["frequency"]) < mean["any"] / 1.5
