"""NAEE's exhaustive search as the yardstick of cheaper rankings: which experts of a layer may go?

On random layers of eight experts. Experts of a random layer have nothing to do with one another, so a kept expert of
large output also harms the tokens that are rerouted to it: no ranking that scores experts one by one comes near the
optimum here, and EASY-EP is not better than counting. Trained layers are another matter (docs/methods.md).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest
import torch

KEPT = 5


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "naee_regret", Path(__file__).parent.parent / "benchmarks/naee_regret.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["naee_regret"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


made = load()


@pytest.fixture(scope="module")
def regrets() -> dict[str, list[float]]:
    found = [made.regret(made.random_layer(seed), KEPT) for seed in range(8)]
    return {name: [one[name] for one in found] for name in found[0]}


def test_nothing_beats_the_exhaustive_search(regrets: dict[str, list[float]]) -> None:
    assert min(map(min, regrets.values())) >= 0


def test_rankings_beat_a_set_drawn_at_random(regrets: dict[str, list[float]]) -> None:
    mean = {name: fmean(values) for name, values in regrets.items()}
    assert max(mean["easy_ep"], mean["gate"], mean["frequency"]) < mean["any"] / 1.5


def test_a_set_computes_what_its_experts_add() -> None:
    """Row by row: the softmax over kept logits, its best two, renormalised."""
    layer, kept = made.random_layer(3), (1, 2, 4, 6, 7)
    output_NH = layer.output(kept)
    for row, logits_E in enumerate(layer.logits_NE.double().tolist()):
        best = sorted(kept, key=lambda e: -logits_E[e])[:2]
        shares = torch.tensor([logits_E[e] for e in best], dtype=torch.float64).softmax(0)
        expected_H = sum(w * layer.outputs_NEH[row, e].double() for w, e in zip(shares, best, strict=True))
        torch.testing.assert_close(output_NH[row].double(), expected_H, atol=1e-5, rtol=1e-4)
